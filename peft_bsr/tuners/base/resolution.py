"""The result of all checks before an adapter is attached: what attaching it will do to the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.tuners.base.frozen_weights import linears_to_round

if TYPE_CHECKING:
    from peft_bsr.tuners.base.config import SavedConfig

_Resolution = TypeVar("_Resolution", bound="Resolution")


@dataclass(frozen=True)
class Resolution:
    """What the configuration means for a model. Contains names of modules, not modules.

    Attributes:
        spec: Description of the model.
        plan: Plan of its blocks, limited to what the checks allow.
        rounded: Names of frozen Linear modules -> `"int8"` or `"bfloat16"`, the precision of their weights.
    """

    spec: ModelSpec
    plan: Plan
    rounded: Mapping[str, str]

    @property
    def held(self) -> list[str]:
        """Names of the modules whose weights the adapter has or replaces."""
        raise NotImplementedError(f"{type(self).__name__} does not implement `held`")

    @property
    def exact_names(self) -> Collection[str]:
        """Roles of leaf modules that are never rounded."""
        return ()

    def with_width(self: _Resolution, width: int) -> _Resolution:
        """The same for a model of that width."""
        return replace(self, spec=replace(self.spec, width=width))

    def to_round(self, model: nn.Module, config: SavedConfig) -> dict[str, str]:
        """`rounded` for `config`, on a model that has the same modules."""
        return linears_to_round(model, self.spec, config, self.plan.trained_blocks, self.exact_names)


__all__ = ["Resolution"]
