"""Adapters in folders and on the Hub: loading in one call, saving with a model card."""

from peft_bsr.hub.card import model_card, write_card
from peft_bsr.hub.facts import CardFacts, add_facts, facts_of
from peft_bsr.hub.loading import load, load_base, read_config
from peft_bsr.hub.preprocessing import (
    find_image_processor,
    fit_processor,
    keep_image_processor,
    load_image_processor,
    pipeline,
)
from peft_bsr.hub.push import push_to_hub
from peft_bsr.hub.task import Task, task_of
from peft_bsr.tuners.base.config import AFTER_SAVE

AFTER_SAVE += [action for action in (write_card, keep_image_processor) if action not in AFTER_SAVE]

__all__ = [
    "CardFacts",
    "Task",
    "add_facts",
    "facts_of",
    "find_image_processor",
    "fit_processor",
    "load",
    "load_base",
    "load_image_processor",
    "model_card",
    "pipeline",
    "push_to_hub",
    "read_config",
    "task_of",
    "write_card",
]
