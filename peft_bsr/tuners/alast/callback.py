"""ALaST in Trainer: the learning rate for the budgets, and what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peft_bsr.errors import AdapterError
from peft_bsr.tuners.alast.layer import ALaSTController
from peft_bsr.tuners.alast.schedule import ALaSTSchedule


@dataclass(frozen=True)
class BudgetRecord:
    """One optimizer step.

    Attributes:
        step: Its number, from 1.
        budgets: One a block, as they counted in it.
        drawn: Indices of the blocks that trained, ascending.
    """

    step: int
    budgets: tuple[float, ...]
    drawn: tuple[int, ...]


class ALaSTCallback(TrainerCallback):
    """Tells the schedule the learning rate (`alpha="lr"`) and keeps a record of every step.

    Logs get `budget_mean`, `budget_min` and `budget_max`, for reporters that come after this callback.

    Attributes:
        history: One `BudgetRecord` a step, for `peft_bsr.viz.draw_budgets`.

    Examples:
        >>> ALaSTCallback().history  # Trainer(..., callbacks=[callback]).train() fills it
        []
    """

    def __init__(self) -> None:
        self.history: list[BudgetRecord] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand over the learning rate."""
        schedule = schedule_of(kwargs["model"])
        schedule.learning_rate = float(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write down what the step did."""
        schedule = schedule_of(kwargs["model"])
        schedule.next_step()
        self.history.append(BudgetRecord(state.global_step, tuple(schedule.budgets), tuple(schedule.drawn)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the budgets' range."""
        budgets = schedule_of(kwargs["model"]).budgets
        if logs is not None and "loss" in logs:
            logs |= {
                "budget_mean": sum(budgets) / len(budgets),
                "budget_min": min(budgets),
                "budget_max": max(budgets),
            }


def schedule_of(model: nn.Module) -> ALaSTSchedule:
    """The schedule active, whatever wraps the model.

    Raises:
        AdapterError: If the model has no active ALaST adapter.
    """
    for module in model.modules():
        if isinstance(module, ALaSTController) and module.schedule is not None:
            return module.schedule
    raise AdapterError(
        f"{type(model).__name__} has no active ALaST adapter. Attach one with `get_peft_model(model, ALaSTConfig())`, "
        "or leave `ALaSTCallback` out."
    )


__all__ = ["ALaSTCallback", "BudgetRecord", "schedule_of"]
