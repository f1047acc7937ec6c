"""Models that are offered by name: their configurations are written here, so that none is downloaded to plan."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, DeiTConfig, Dinov2Config, SiglipConfig, ViTConfig

from peft_bsr.cli.plan import trained_size
from peft_bsr.cli.sources import find_adapter, from_config, model_of, read_model_config
from peft_bsr.cost import PlanCosts

_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_DINOV2 = {"image_size": 518, "patch_size": 14}

KNOWN: dict[str, tuple[type, dict[str, Any]]] = {
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
"""Hub id -> class and fields of its configuration, as far as memory and compute depend on them."""


def config_of(source: str) -> Any:
    """The configuration of a model.

    Args:
        source: One of `KNOWN`, a folder or another Hub id; of an adapter, its base model is taken.

    Raises:
        HubError: If there is none.
        UsageError: If it cannot be read.
    """
    if source in KNOWN:
        made, fields = KNOWN[source]
        return made(**fields)
    return read_model_config(model_of(find_adapter(source), source))


def own_size(source: str) -> int | None:
    """Pixels that `peft-bsr train` takes where it is not what the configuration says, or None.

    Args:
        source: See `config_of`.
    """
    if source in KNOWN:
        return 224 if KNOWN[source][0] is Dinov2Config else None
    return trained_size(config_of(source), source)


@lru_cache(maxsize=8)
def costs_of(source: str, labels: int) -> PlanCosts:
    """What ways to train a model cost, remembered between plans; no weights are loaded.

    Args:
        source: See `config_of`.
        labels: Classes of its head.
    """
    config = config_of(source)
    config.num_labels = labels
    with torch.device("meta"):
        model: nn.Module = from_config(config)
    return PlanCosts(model)


__all__ = ["KNOWN", "config_of", "costs_of", "own_size"]
