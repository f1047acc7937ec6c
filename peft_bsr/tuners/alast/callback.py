"""ALaST in Trainer: passes the learning rate to the budgets and records them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from peft_bsr.deprecation import warn_renamed
from peft_bsr.errors import AdapterError
from peft_bsr.tuners.alast.layer import ALaSTController
from peft_bsr.tuners.alast.schedule import ALaSTSchedule

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class BudgetRecord:
    """One optimizer step.

    Attributes:
        step: Number of the step, from 1.
        budgets: Budget of each block in this step.
        selected: Indices of the blocks that trained, ascending.
    """

    step: int
    budgets: tuple[float, ...]
    selected: tuple[int, ...]

    @property
    def drawn(self) -> tuple[int, ...]:
        """Old name of `selected`."""
        warn_renamed("BudgetRecord.drawn", "BudgetRecord.selected")
        return self.selected


class ALaSTCallback(TrainerCallback):
    """Passes the learning rate to the schedule (`alpha="lr"`) and records every step.

    Adds `budget_mean`, `budget_min` and `budget_max` to the logs, for reporting callbacks after this one.

    Attributes:
        history: One `BudgetRecord` per step, for `peft_bsr.viz.draw_budgets`.

    Examples:
        >>> ALaSTCallback().history  # Trainer(..., callbacks=[callback]).train() fills it
        []
    """

    def __init__(self) -> None:
        self.history: list[BudgetRecord] = []

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: object,
    ) -> None:
        """Pass the learning rate to the schedule."""
        schedule = schedule_of(model)
        schedule.learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: object
    ) -> None:
        """Record the step."""
        schedule = schedule_of(model)
        schedule.next_step()
        self.history.append(BudgetRecord(state.global_step, tuple(schedule.budgets), tuple(schedule.selected)))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        *,
        model: nn.Module,
        **kwargs: object,
    ) -> None:
        """Add mean, minimum and maximum of the budgets."""
        budgets = schedule_of(model).budgets
        if logs is not None and "loss" in logs:
            logs |= {
                "budget_mean": sum(budgets) / len(budgets),
                "budget_min": min(budgets),
                "budget_max": max(budgets),
            }


def schedule_of(model: nn.Module) -> ALaSTSchedule:
    """The schedule of the active adapter. The model may be wrapped, for example by DistributedDataParallel.

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
