"""The router of ALaST: a block's part of the plan of the step that runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peft_bsr.backbones import Column, FamilyRule
from peft_bsr.core import RouteCarrier
from peft_bsr.engine import Plan
from peft_bsr.tuners.alast.schedule import ALaSTSchedule
from peft_bsr.tuners.bsr.router import BSRRouter

STATE = "bsr_state"


class ALaSTRouter(BSRRouter):
    """A block's router whose plan the schedule makes, in training; in evaluation the model runs as it is.

    The first block's router carries the schedules' state into and out of state dicts, under `bsr_state.<adapter>`.

    Args:
        index, column, carrier, rule: See `BlockRouter`.
    """

    def __init__(self, index: int, column: Column, carrier: RouteCarrier, rule: FamilyRule) -> None:
        super().__init__(index, column, carrier, rule)
        self.schedules: dict[str, ALaSTSchedule] = {}

    @property
    def schedule(self) -> ALaSTSchedule | None:
        """The active adapter's, or None where adapters are disabled."""
        name = self.carried_adapter
        return None if name is None else self.schedules[name]

    @property
    def plan(self) -> Plan | None:
        """The plan of this step, or None in evaluation and before the first step."""
        schedule = self.schedule
        return schedule.plan if schedule is not None and self.training else None

    @property
    def changes(self) -> bool:
        """True."""
        return True

    def begin(self) -> None:
        """Tell the schedule that a training forward begins."""
        if self.training and torch.is_grad_enabled() and (schedule := self.schedule) is not None:
            schedule.begin()

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Show the schedule what the block did."""
        if self.training and torch.is_grad_enabled() and (schedule := self.schedule) is not None:
            schedule.observe(before, after, self.column.num_prefix)

    def rehearsal(self) -> AbstractContextManager[Any]:
        """Forwards inside move no budget and draw for themselves alone."""
        return nullcontext() if self.schedule is None else self.schedule.rehearsal()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter."""
        super().delete_adapter(adapter_name)
        self.schedules.pop(adapter_name, None)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, schedule in self.schedules.items() if self.index == 0 else ():
            destination[f"{prefix}{STATE}.{name}"] = schedule.pack()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name, schedule in self.schedules.items() if self.index == 0 else ():
            packed = state_dict.pop(f"{prefix}{STATE}.{name}", None)
            if packed is not None:
                schedule.unpack(packed)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"alast.ALaSTRouter(block={self.index}, schedules={sorted(self.schedules)})"


__all__ = ["STATE", "ALaSTRouter"]
