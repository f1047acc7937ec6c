"""What was measured of an adapter, kept with it in memory until its model card is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from peft_bsr.cost import Cost
from peft_bsr.errors import AdapterError
from peft_bsr.tuners.base.config import SavedConfig


@dataclass(frozen=True)
class CardFacts:
    """What only a run can know. The card says nothing about what is missing here.

    Attributes:
        dataset: Hub id or name of what it was trained on.
        metrics: Name -> value, for example `{"test accuracy": 0.95}`: the split, if it is told, and the metric, in one
            word (`"test balanced_accuracy"`).
        tables: Title, headings and rows of tables below them, such as figures by class.
        costs: Name -> `Cost` of this adapter and of what it is compared with, from `peft_bsr.cost.compare`; the first
            is the reference.
        conditions: Under which the costs were measured (device, dtype, batch, versions).
        picture: PNG file of kept tokens, copied beside the card.
        repo_id: Repository on the Hub that the card is for; `push_to_hub` says it.
    """

    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    costs: Mapping[str, Cost] = field(default_factory=dict)
    conditions: str | None = None
    picture: str | Path | None = None
    repo_id: str | None = None


def add_facts(model: nn.Module, *, adapter_name: str | None = None, **facts: Any) -> CardFacts:
    """Tell an adapter what was measured of it; `save_pretrained` and `push_to_hub` write it into the model card.

    Args:
        model: With one of our adapters.
        adapter_name: Default the active one.
        facts: Fields of `CardFacts`. What is not named stays as it was told before.

    Returns:
        All that is known now.

    Raises:
        AdapterError: If the model has no such adapter of ours.
        TypeError: If there is no such field.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_bsr import BSRConfig
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig())
        >>> add_facts(model, dataset="beans", metrics={"accuracy": 0.95}).dataset
        'beans'
    """
    config = _config_of(model, adapter_name)
    config.facts = replace(facts_of(model, adapter_name), **facts)
    return config.facts


def facts_of(model: nn.Module, adapter_name: str | None = None) -> CardFacts:
    """What an adapter was told.

    Args:
        model: See `add_facts`.
        adapter_name: See `add_facts`.
    """
    return _config_of(model, adapter_name).facts or CardFacts()


def _config_of(model: nn.Module, adapter_name: str | None) -> Any:
    configs: Any = getattr(model, "peft_config", {})
    active: Any = getattr(model, "active_adapter", None)
    name = adapter_name or active
    config = configs.get(name) if isinstance(configs, dict) else None
    if not isinstance(config, SavedConfig):
        raise AdapterError(
            f"{type(model).__name__} has no adapter {name!r} of peft_bsr; it has {sorted(configs)}. Attach one with "
            "`get_peft_model(model, BSRConfig())`."
        )
    return config


__all__ = ["CardFacts", "add_facts", "facts_of"]
