"""Cache of estimates for one model, so that it can be planned for several budgets."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.cost.estimation import Estimate, estimate
from peft_bsr.cost.proxy import on_meta, resolve_narrow
from peft_bsr.cost.setup import Setup
from peft_bsr.cost.ways import Allows
from peft_bsr.tuners import BSRConfig


class MissingEstimateError(LookupError):
    """An estimate that is not in the cache.

    Attributes:
        config: Configuration of the adapter.
        setup: How the model is trained.
    """

    def __init__(self, config: BSRConfig | None, setup: Setup) -> None:
        super().__init__("it was not estimated yet")
        self.config, self.setup = config, setup


class PlanCosts:
    """Cached estimates of one model. Pass it to `plan_for_budget` instead of the model to plan for several budgets.

    Args:
        model: See `estimate`; best without weights. It is not changed or kept.

    Attributes:
        model: The model on the meta device. All parameters require gradients, because full fine-tuning is a plan too.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> costs = PlanCosts(ViTForImageClassification(ViTConfig(num_hidden_layers=2, hidden_size=48)))
        >>> costs.spec.depth, costs(None, Setup(batch_size=2)) is costs(None, Setup(batch_size=2))
        (2, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = on_meta(model).requires_grad_(True)
        self._known: dict[tuple[str, Setup], Estimate] = {}
        self._estimates = True

    def __call__(self, config: BSRConfig | None, setup: Setup) -> Estimate:
        """See `estimate`."""
        key = (repr(config), setup)
        if key not in self._known:
            if not self._estimates:
                raise MissingEstimateError(config, setup)
            self._known[key] = estimate(self.model, config, setup)
        return self._known[key]

    def cached_only(self) -> PlanCosts:
        """The same costs; an estimate that is not in the cache raises `MissingEstimateError`."""
        view = copy.copy(self)
        view._estimates = False
        return view

    @cached_property
    def spec(self) -> ModelSpec:
        """Description of the model; widths are those of a narrow proxy."""
        return resolve_narrow(self.model, BSRConfig(keep_rate=1.0)).spec

    @property
    def allows(self) -> Allows:
        """What the model allows."""
        return Allows.by(self.model, self.spec)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


__all__ = ["MissingEstimateError", "PlanCosts"]
