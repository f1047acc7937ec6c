"""Training that ends after so many seconds, with a schedule over the clock instead of steps."""

from __future__ import annotations

import math
import time
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback


class TimeBudget(TrainerCallback):
    """A clock that starts when it is made.

    Args:
        seconds: How long training takes, with all that comes before it: attaching, building a cache.
        warmup: Share of the time in which the rate rises.
    """

    def __init__(self, seconds: float, warmup: float) -> None:
        self.seconds, self.warmup, self._begin = seconds, warmup, time.perf_counter()

    @property
    def spent(self) -> float:
        """Share of the time, up to 1."""
        return min(1.0, (time.perf_counter() - self._begin) / self.seconds)

    def rate(self, step: int) -> float:
        """Share of the highest learning rate: linear warm-up, then a cosine to zero."""
        if self.spent < self.warmup:
            return max(self.spent, 1e-3) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (self.spent - self.warmup) / (1 - self.warmup)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the time is up."""
        control.should_training_stop = self.spent == 1


class TimedTrainer(Trainer):
    """A Trainer whose schedule is that of `budget`; None = the one of its arguments."""

    budget: TimeBudget | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """The schedule over the clock."""
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(optimizer, self.budget.rate)
        self.add_callback(self.budget)
        return self.lr_scheduler


__all__ = ["TimeBudget", "TimedTrainer"]
