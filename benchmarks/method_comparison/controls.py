"""Changes of a training that no configuration has; see `control` in `training_params.json`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from time_budget import TimedTrainer
from torch.nn.functional import kl_div
from transformers import TrainerCallback

from peft_bsr.training import schedule_of


class RandomBudgets(TrainerCallback):
    """A control for ALaST: in each step, budgets are drawn at random around the initial one."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw new budgets."""
        schedule = schedule_of(kwargs["model"])
        start, (low, high) = schedule.config.initial_budget, schedule.config.budget_range
        reach = min(start - low, high - start)
        schedule.budgets = [self.generator.uniform(start - reach, start + reach) for _ in schedule.budgets]


@contextmanager
def keep_rate(model: PeftModel, rate: float) -> Iterator[None]:
    """A context in which all reductions keep this share of the tokens."""
    plans = [(controller.plans, controller.plan) for controller in model.base_model.controllers]
    for own, plan in plans:
        own["default"] = plan.with_reductions(keep_rate=rate)
    try:
        yield
    finally:
        for own, plan in plans:
            own["default"] = plan


class FallingRate(TimedTrainer):
    """The keep rate falls from 1 to the configuration's, evenly over the first half of the steps."""

    def training_step(self, model: PeftModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step at the current rate."""
        last = model.peft_config["default"].keep_rate
        rate = max(last, 1 - (1 - last) * 2 * self.state.global_step / self.state.max_steps)
        with keep_rate(model, rate):
            return super().training_step(model, *args, **kwargs)


class SelfDistilled(TimedTrainer):
    """The loss has one more term: the KL divergence to the model's own outputs on all tokens, as constants."""

    def compute_loss(self, model: PeftModel, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss; the second term only in training."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad(), keep_rate(model, 1.0):
            teacher = model(pixel_values=inputs["pixel_values"]).logits
        output = model(**inputs)
        student = output.logits.log_softmax(-1)
        return output.loss + kl_div(student, teacher.log_softmax(-1), reduction="batchmean", log_target=True)


TRAINERS = {"falling_rate": FallingRate, "self_distilled": SelfDistilled}
"""`control` -> Trainer; the others have the usual one."""

__all__ = ["TRAINERS", "RandomBudgets"]
