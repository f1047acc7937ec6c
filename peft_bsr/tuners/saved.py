"""What an adapter's configuration remembers of the model it was attached to, and who hears when it is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from peft_bsr.backbones import Column
from peft_bsr.engine import Plan
from peft_bsr.tuners.classifier import without_layer
from peft_bsr.tuners.files import AdapterFiles

AFTER_SAVE: list[Callable[[Any, Path], None]] = []
"""Called with an attached adapter's configuration and its folder, each time they are saved: the model card's way in.
PEFT has no hook for it: the card is written by `PeftModel` itself, whose class we do not change."""


@dataclass(frozen=True)
class Attachment:
    """What is known of the model that an adapter was attached to; no part of the adapter's file.

    Attributes:
        column: What the model is.
        plan: What is done to it; of ALaST, the plan its steps are made from.
    """

    column: Column
    plan: Plan


@dataclass
class SavedConfig(AdapterFiles, PeftConfig):
    """Base of our configurations.

    Args:
        labels: Names of the classes, by number. Written when the adapter is attached to a model with a classifier; by
            it `peft_bsr.load` gives the base model a head of the right size.
    """

    labels: list[str] | None = field(
        default=None, metadata={"help": "Written at attach: names of the classes that the head tells apart."}
    )

    attachment = None  # an Attachment; not annotated, because it is no field and not saved
    facts = None  # what was measured, see `peft_bsr.hub.Facts`

    def attached_to(self, model: nn.Module, column: Column, plan: Plan) -> None:
        """Remember the model."""
        self.attachment = Attachment(column, plan)
        self.labels = None if getattr(self, "tasks", None) else find_labels(model, column)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's own, and then whoever asked for it.

        Args:
            save_directory: Folder.
            kwargs: PEFT's.
        """
        super().save_pretrained(save_directory, **kwargs)
        if self.attachment is not None:
            for action in AFTER_SAVE:
                action(self, Path(save_directory))


def find_labels(model: nn.Module, column: Column) -> list[str] | None:
    """Names of the classes by number, or None where no part of the head is a classifier of so many."""
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    heads = [without_layer(model.get_submodule(name)) for name in column.head]
    if not any(isinstance(head, nn.Linear) and head.out_features == len(named) for head in heads):
        return None
    return [str(named[index]) for index in sorted(named)]


__all__ = ["AFTER_SAVE", "Attachment", "SavedConfig", "find_labels"]
