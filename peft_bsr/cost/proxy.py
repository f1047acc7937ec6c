"""Models without the original weights: a copy on the meta device, and a narrow proxy that can run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peft_bsr.backbones import find_part, inner_config, native_size, set_image_size
from peft_bsr.compat.peft_api import cast_adapter
from peft_bsr.compat.transformers_api import forget_source
from peft_bsr.errors import PeftBsrError, UnsupportedModelError
from peft_bsr.tuners import Resolution, known_method, resolve
from peft_bsr.tuners.base.config import SavedConfig

_HEAD_WIDTH = 8  # of the proxy: large enough for rotary embeddings


def on_meta(model: nn.Module, image_size: int | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy of the model without weights, on the meta device.

    Args:
        model: Transformers model without adapters.
        image_size: Pixels per side. Default None: the size of the model.
        dtype: Dtype of the weights. Default None: the dtype of the model.

    Raises:
        ConfigError: If the image size is not a multiple of the patch size.
        UnsupportedModelError: If it cannot be made from its config, or does not support the image size.
    """
    _check_whole(model, None)
    config = _config_of(model)
    with torch.device("meta"):
        bare = _make(model, config)
    if image_size is not None:
        if native_size(config) is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no `image_size` to change. Use `image_size=None`.")
        set_image_size(bare, image_size)
        inner_config(
            bare.config
        ).image_size = image_size  # the size of dummy inputs, also for models that take any size
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return bare.to(dtype or next(p.dtype for p in model.parameters() if p.is_floating_point()))


def resolve_narrow(model: nn.Module, config: SavedConfig) -> Resolution:
    """Resolve an adapter for a model without weights, on a narrow proxy with the same blocks and tokens.

    Where the config names no one width of all blocks (stages), the proxy is as wide as the model, with random weights.

    Args:
        model: Model from `on_meta`.
        config: Configuration of the adapter.

    Raises:
        ConfigError: If this model does not support the config.
        UnsupportedModelError: If the model is not a plain vision transformer.
    """
    _check_whole(model, config.part)
    narrow = _config_of(model)
    width = _narrow(narrow)
    with torch.random.fork_rng(devices=()):
        proxy = _make(model, narrow).eval()
    whole = copy.deepcopy(config)
    whole.frozen_weights = "full"  # quantization is not tried on the proxy
    found: Resolution = resolve(proxy, whole)
    return found if width is None else found.with_width(width)


def _narrow(config: PreTrainedConfig) -> int | None:
    """Make the config that of a narrow model, and return the width before; None if blocks differ in width."""
    vision = inner_config(config)
    heads, width = (getattr(vision, name, None) for name in ("num_attention_heads", "hidden_size"))
    has_stages = any(name.endswith("_per_stage") for name in vars(vision))
    if not isinstance(heads, int) or not isinstance(width, int) or has_stages:
        return None
    vision.hidden_size = _HEAD_WIDTH * heads
    if hasattr(vision, "intermediate_size"):
        vision.intermediate_size = 2 * vision.hidden_size
    for name, value in vars(config).items():  # heads that are told the blocks' width again (DepthAnything, UperNet)
        if name.endswith(("hidden_size", "in_channels")) and value == width:
            setattr(config, name, vision.hidden_size)
    return width


def attach_resolved(model: nn.Module, config: SavedConfig, resolution: Resolution) -> tuple[nn.Module, list[str]]:
    """Attach an adapter to a model that cannot be probed, because it has no values.

    Args:
        model: The model, changed in place.
        config: Configuration of the adapter.
        resolution: Resolution from `resolve_narrow`.

    Returns:
        The model with its adapter, and the names of the Linear modules with `int8` weights. These are not quantized,
        because that needs torchao; `bfloat16` weights are converted.
    """
    wanted = resolution.to_round(model, config)
    own: Any = copy.deepcopy(config)
    own.fills_weights = False
    own.resolution = replace(resolution, rounded={name: how for name, how in wanted.items() if how != "int8"})
    tuner = known_method(config).tuner(model, own, "default")
    cast_adapter(tuner, "default")
    return tuner, [name for name, how in wanted.items() if how == "int8"]


def _check_whole(model: nn.Module, part: str | None) -> None:
    """Raise if the adapter goes to a part of the model: what runs around the part is not known."""
    if (part := find_part(model, part)) is not None:
        raise UnsupportedModelError(
            f"Costs of a part (`{part}`) of {type(model).__name__} are not predicted. Predict those of the vision "
            f"model by itself, `model.{part}`, or measure with `peft_bsr.cost.saved_activations` after attaching."
        )


def _config_of(model: nn.Module) -> PreTrainedConfig:
    """A copy of the model's config."""
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no config to create it from without weights.")
    config = copy.deepcopy(config)
    forget_source(config)
    return config


def _make(model: nn.Module, config: PreTrainedConfig) -> PreTrainedModel:
    make: Callable[[PreTrainedConfig], nn.Module] = type(model)
    try:
        return make(config)
    except PeftBsrError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be created from its config ({type(error).__name__}: {error}). Pass the "
            "base model of transformers, without adapters."
        ) from error


__all__ = ["attach_resolved", "on_meta", "resolve_narrow"]
