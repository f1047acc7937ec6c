"""What attaching an adapter will do to a model, as a value: made by checks on the model, which it does not change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.tuners.base.frozen_weights import linears_to_round


@dataclass(frozen=True)
class Resolution:
    """What was found on the model, and what the configuration means there. Names of modules, no modules.

    Attributes:
        spec: What the model is.
        plan: What its blocks do, as the checks allowed it.
        rounded: Names of frozen Linear modules -> how their weights are rounded, `"int8"` or `"bfloat16"`.
    """

    spec: ModelSpec
    plan: Plan
    rounded: Mapping[str, str]

    @property
    def held(self) -> list[str]:
        """Names of the modules whose weights the adapter has, or takes the place of."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its adapter holds")

    @property
    def exact_names(self) -> Collection[str]:
        """Roles of leaf modules that are never rounded."""
        return ()

    def with_width(self, width: int) -> Any:
        """The same for a model of that width."""
        return replace(self, spec=replace(self.spec, width=width))

    def to_round(self, model: nn.Module, config: Any) -> dict[str, str]:
        """What `rounded` is for `config` on a model that has the same modules."""
        return linears_to_round(model, self.spec, config, self.plan.trained_blocks, self.exact_names)


__all__ = ["Resolution"]
