"""The registry of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.registration import register_method
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.part import resolve_part
from peft_bsr.tuners.base.resolution import Resolution
from peft_bsr.tuners.base.tuner import MethodTuner


@dataclass(frozen=True)
class MethodInfo:
    """A fine-tuning method. The planner, cards, export and the command line use only this, not a method's name.

    Attributes:
        name: Lower-case name, for `--method`. PEFT's `peft_type` is the same in upper case.
        title: Full name.
        paper: Reference of the paper.
        config: Configuration class.
        tuner: Tuner class.
        learning_rates: `trainable` of the configuration (None if it has no such field) -> default peak learning rate
            for AdamW.
        describe: (configuration, spec, plan) -> sentences about what an adapter does to its model.
        callbacks: Creates the callbacks that Trainer needs for the method.
    """

    name: str
    title: str
    paper: str
    config: type[SavedConfig]
    tuner: type[MethodTuner]
    learning_rates: Mapping[str | None, float]
    describe: Callable[[Any, ModelSpec, Plan], list[str]]
    callbacks: Callable[[], list[TrainerCallback]] = field(default=list)

    @property
    def is_dynamic(self) -> bool:
        """Whether the plan changes from step to step."""
        return self.tuner.controller_cls.is_dynamic


METHODS: dict[str, MethodInfo] = {}
"""Name -> registered method."""


def register(info: MethodInfo) -> MethodInfo:
    """Register a method with PEFT and with this package. Calling it again has no effect.

    Args:
        info: The method.
    """
    register_method(info.name, info.config, info.tuner)
    METHODS[info.name] = info
    return info


def method_of(config: PeftConfig) -> MethodInfo | None:
    """The method of a configuration, or None if it is not one of this package."""
    return next((info for info in METHODS.values() if isinstance(config, info.config)), None)


def describe_plan(config: SavedConfig, spec: ModelSpec, plan: Plan) -> list[str]:
    """What an adapter does to its model, as a list of sentences. Blocks are counted from 0.

    Args:
        config: The adapter's configuration.
        spec: Description of the model. Numbers of tokens are those of its image size, which is the probe's;
            `spec.at_size(448, 448)` gives those of another.
        plan: Plan of the blocks.
    """
    part = [] if spec.part is None else [f"Blocks are those of `{spec.part}`, a part of the model."]
    return [*part, *known_method(config).describe(config, spec, plan)]


def resolve(model: nn.Module, config: SavedConfig) -> Resolution:
    """What attaching an adapter would do to the model. Runs all checks and does not change the model.

    Args:
        model: A supported vision transformer.
        config: Configuration of the adapter.

    Raises:
        UnsupportedModelError: If the model is not supported; the message gives the reason.
        ConfigError: If the model does not allow the configuration; the message names every problem.
    """
    return resolve_part(known_method(config).tuner, model, config)


def known_method(config: SavedConfig) -> MethodInfo:
    """The method of a configuration of this package."""
    info = method_of(config)
    assert info is not None, f"{type(config).__name__} is of no registered method"
    return info


__all__ = ["METHODS", "MethodInfo", "describe_plan", "known_method", "method_of", "register", "resolve"]
