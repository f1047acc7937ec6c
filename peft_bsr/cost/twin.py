"""Stand-ins for a model whose weights are not there: itself on the meta device, and a narrow twin that can run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peft_bsr.backbones import Column
from peft_bsr.engine import Plan
from peft_bsr.errors import PeftBsrError, UnsupportedModelError
from peft_bsr.tuners.bsr.config import BSRConfig
from peft_bsr.tuners.bsr.layer import BSRRouter
from peft_bsr.tuners.bsr.model import BSRModel
from peft_bsr.tuners.bsr.targets import resolve_targets

_HEAD_WIDTH = 8  # of the twin: enough for rotary tables


@dataclass(frozen=True)
class Settled:
    """What a BSR adapter will do to a model.

    Attributes:
        column: The model's.
        plan: As the checks on the twin allowed it.
    """

    column: Column
    plan: Plan


def on_meta(model: nn.Module, image_size: int | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The same model without weights.

    Args:
        model: Of transformers, without adapters.
        image_size: Pixels, default the model's.
        dtype: Of the weights, default the model's.

    Raises:
        UnsupportedModelError: If it cannot be made from its config.
    """
    config = copy.deepcopy(_config_of(model))
    if image_size is not None:
        vision = getattr(config, "vision_config", config)
        if not hasattr(vision, "image_size"):
            raise UnsupportedModelError(f"{type(model).__name__} has no `image_size` to change; leave it None.")
        vision.image_size = image_size
    with torch.device("meta"):
        bare = _make(model, config)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return bare.to(dtype or next(p.dtype for p in model.parameters() if p.is_floating_point()))


def settle(model: nn.Module, config: BSRConfig) -> Settled:
    """Attach the adapter to a twin with the same blocks, heads and tokens, but narrow, and see what it does there.

    Args:
        model: From `on_meta`.
        config: Of the adapter.

    Raises:
        ConfigError: If the config asks for what this model does not allow.
        UnsupportedModelError: If the model is no plain vision transformer.
    """
    narrow = copy.deepcopy(_config_of(model))
    vision = getattr(narrow, "vision_config", narrow)
    heads = getattr(vision, "num_attention_heads", None)
    if heads is None or not hasattr(vision, "hidden_size"):
        raise UnsupportedModelError(
            f"{type(model).__name__}'s config names no `hidden_size` and `num_attention_heads`, by which a narrow twin "
            "could be made. Attach the adapter to the model itself and measure it."
        )
    width, vision.hidden_size = vision.hidden_size, _HEAD_WIDTH * heads
    if hasattr(vision, "intermediate_size"):
        vision.intermediate_size = 2 * vision.hidden_size
    with torch.random.fork_rng(devices=()):
        twin = _make(model, narrow).eval()
    adapted = BSRModel(twin, copy.deepcopy(config), "default")
    return Settled(replace(adapted.column, width=width), adapted.plan())


class SettledModel(BSRModel):
    """A `BSRModel` on a model that cannot be probed, having no numbers.

    Args:
        model: The model.
        config: Of the adapter.
        settled: What was found on its twin.
    """

    def __init__(self, model: nn.Module, config: BSRConfig, settled: Settled) -> None:
        self.__dict__["_found"] = settled  # nn.Module's own __init__ comes later
        super().__init__(model, config, "default")

    def _settle(
        self, model: nn.Module, config: BSRConfig, routers: list[BSRRouter]
    ) -> tuple[Column, Plan, dict[str, str]]:
        found: Settled = self.__dict__["_found"]
        _, self._targets, layout = resolve_targets(model, found.column, config)
        return found.column, found.plan, layout


def _config_of(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no config, by which it could be made without weights.")
    return config


def _make(model: nn.Module, config: Any) -> nn.Module:
    make: Any = type(model)
    try:
        return make(config)
    except PeftBsrError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be made from its config ({type(error).__name__}: {error}). Pass the base "
            "model of transformers, without adapters."
        ) from error


__all__ = ["Settled", "SettledModel", "on_meta", "settle"]
