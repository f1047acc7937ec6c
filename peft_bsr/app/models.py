"""Models that the planner offers. Their configurations are stored here, so that planning downloads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from transformers import CLIPConfig, DeiTConfig, Dinov2Config, PreTrainedConfig, SiglipConfig, ViTConfig

from peft_bsr.cli.plan import trained_size
from peft_bsr.cli.sources import find_adapter, from_config, model_of, read_model_config
from peft_bsr.cost import PlanCosts

_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_DINOV2 = {"image_size": 518, "patch_size": 14}

KNOWN: dict[str, tuple[type[PreTrainedConfig], Mapping[str, object]]] = {
    "google/vit-base-patch16-224": (ViTConfig, {}),
    "google/vit-large-patch16-224": (ViTConfig, _LARGE),
    "WinKawaks/vit-tiny-patch16-224": (ViTConfig, _TINY),
    "WinKawaks/vit-small-patch16-224": (ViTConfig, _SMALL),
    "facebook/deit-tiny-distilled-patch16-224": (DeiTConfig, _TINY),
    "facebook/deit-base-distilled-patch16-224": (DeiTConfig, {}),
    "facebook/dinov2-small": (Dinov2Config, {"hidden_size": 384, "num_attention_heads": 6, **_DINOV2}),
    "facebook/dinov2-base": (Dinov2Config, _DINOV2),
    "openai/clip-vit-base-patch16": (CLIPConfig, {"vision_config": {"patch_size": 16}}),
    "google/siglip-base-patch16-224": (SiglipConfig, {"vision_config": {"image_size": 224}}),
}
"""Hub id -> class and fields of its configuration that affect memory and compute."""


@lru_cache(maxsize=8)
def model_name(source: str) -> str:
    """Hub id or folder of a model.

    Args:
        source: One of `KNOWN`, a folder or another Hub id. For an adapter, the base model is used.

    Raises:
        HubError: If it does not exist.
        UsageError: If it is neither a model nor an adapter.
    """
    return source if source in KNOWN else model_of(find_adapter(source), source)


def config_of(source: str) -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        source: See `model_name`.

    Raises:
        UsageError: If the configuration cannot be read.
    """
    name = model_name(source)
    if name in KNOWN:
        made, fields = KNOWN[name]
        return made(**fields)
    return read_model_config(name)


def own_size(source: str) -> int | None:
    """Image size that `peft-bsr train` uses if it differs from the configuration, or None.

    Args:
        source: See `model_name`.
    """
    name = model_name(source)
    if name in KNOWN:
        return 224 if KNOWN[name][0] is Dinov2Config else None
    return trained_size(config_of(name), name)


@lru_cache(maxsize=8)
def costs_of(source: str, labels: int) -> PlanCosts:
    """Cached training costs of a model; no weights are loaded.

    Args:
        source: See `model_name`.
        labels: Number of classes of its head.
    """
    config = config_of(source)
    config.num_labels = labels
    with torch.device("meta"):
        model = from_config(config)
    return PlanCosts(model)


__all__ = ["KNOWN", "config_of", "costs_of", "model_name", "own_size"]
