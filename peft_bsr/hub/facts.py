"""Facts about an adapter's run, kept in memory until its model card is written."""

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
    """Facts about a run for the model card. Missing facts are not on the card.

    Attributes:
        dataset: Hub id or name of the training dataset.
        metrics: Name -> value, for example `{"test accuracy": 0.95}`: optionally the split, and the metric as one word
            (`"test balanced_accuracy"`).
        tables: Title, headings and rows of further tables, such as metrics per class.
        costs: Name -> `Cost` of this adapter and of other methods, from `peft_bsr.cost.compare`; the first is the
            reference.
        conditions: Conditions of the measurement (device, dtype, batch, versions).
        picture: PNG file of kept tokens, copied next to the card.
        image_size: (height, width) of the training images in pixels, for the numbers of tokens. Default None: the size
            of the probe's image, which the card names.
        repo_id: Repository on the Hub; set by `push_to_hub`.
    """

    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    costs: Mapping[str, Cost] = field(default_factory=dict)
    conditions: str | None = None
    picture: str | Path | None = None
    image_size: tuple[int, int] | None = None
    repo_id: str | None = None


def add_facts(model: nn.Module, *, adapter_name: str | None = None, **facts: Any) -> CardFacts:
    """Add facts to an adapter's model card, which `save_pretrained` and `push_to_hub` write.

    Args:
        model: A model with one of our adapters.
        adapter_name: Name of the adapter. Default None: the active one.
        facts: Fields of `CardFacts`. Other fields keep their values.

    Returns:
        All facts of the adapter.

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
    """The facts that were added to an adapter.

    Args:
        model: See `add_facts`.
        adapter_name: See `add_facts`.
    """
    return _config_of(model, adapter_name).facts or CardFacts()


def _config_of(model: nn.Module, adapter_name: str | None) -> Any:
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapter", None)
    name = adapter_name or active
    config = configs.get(name) if isinstance(configs, dict) else None
    if not isinstance(config, SavedConfig):
        raise AdapterError(
            f"{type(model).__name__} has no adapter {name!r} of peft_bsr; it has {sorted(configs)}. Attach one with "
            "`get_peft_model(model, BSRConfig())`."
        )
    return config


__all__ = ["CardFacts", "add_facts", "facts_of"]
