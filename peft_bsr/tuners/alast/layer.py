"""The controller of ALaST: a block's part of the plan of the step that runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peft_bsr.backbones import FamilyRule, ModelSpec
from peft_bsr.compat.peft_api import BufferDict
from peft_bsr.core import ForwardContext
from peft_bsr.engine import Plan
from peft_bsr.tuners.alast.schedule import ALaSTSchedule
from peft_bsr.tuners.blocks.controller import MergeableController

STATE = "bsr_state"


class ALaSTController(MergeableController):
    """A block's controller whose plan the schedule makes, in training; in evaluation the model runs as it is.

    The first block's controller saves and loads the schedules' state in buffers that only state dicts see,
    `bsr_state.<adapter>`: torch's distributed checkpoints keep nothing but parameters and buffers.

    Args:
        index, column, context, rule: See `BlockController`.
    """

    is_dynamic = True

    def __init__(self, index: int, spec: ModelSpec, context: ForwardContext, rule: FamilyRule) -> None:
        super().__init__(index, spec, context, rule)
        self.observes = True
        self.schedules: dict[str, ALaSTSchedule] = {}
        if index == 0:
            self.bsr_state = BufferDict(persistent=True)
            self.register_load_state_dict_pre_hook(_write_states)
            self.register_load_state_dict_post_hook(_read_states)

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

    def call(self, block: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block. In training no compiler traces it: the step's draw cannot be, and each step has its own plan.

        Blocks that are compiled one by one (`block.compile()`) stay so.
        """
        if self.training and torch.compiler.is_compiling():
            return self._call_untraced(block, run, args, kwargs)
        return super().call(block, run, args, kwargs)

    @torch.compiler.disable
    def _call_untraced(self, *args: Any) -> Any:
        return super().call(*args)

    def begin(self) -> None:
        """Tell the schedule that a training forward begins."""
        if self.training and torch.is_grad_enabled() and (schedule := self.schedule) is not None:
            schedule.begin()

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Show the schedule what the block did."""
        if self.training and torch.is_grad_enabled() and (schedule := self.schedule) is not None:
            schedule.observe(before, after, self.spec.num_prefix)

    def side_effect_free(self) -> AbstractContextManager[Any]:
        """Forwards inside move no budget and draw for themselves alone."""
        return nullcontext() if self.schedule is None else self.schedule.side_effect_free()

    def add_schedule(self, adapter_name: str, schedule: ALaSTSchedule) -> None:
        """Follow a schedule, which the controllers of all blocks share, for an adapter."""
        self.schedules[adapter_name] = schedule
        if self.index == 0:
            self.bsr_state[adapter_name] = schedule.pack()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter."""
        super().delete_adapter(adapter_name)
        if self.schedules.pop(adapter_name, None) is not None and self.index == 0:
            del self.bsr_state[adapter_name]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With the schedules' state as it is now."""
        _write_states(self)
        return super().state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return f"alast.ALaSTController(block={self.index}, schedules={sorted(self.schedules)})"


def _write_states(controller: ALaSTController, *_: Any) -> None:
    """Put the state of each schedule into its buffer."""
    for name, schedule in controller.schedules.items() if controller.index == 0 else ():
        controller.bsr_state[name] = schedule.pack().to(controller.bsr_state[name].device)


def _read_states(controller: ALaSTController, _: Any) -> None:
    """Go on from what was loaded, for the schedules whose buffer is not what `_write_states` left there."""
    for name, schedule in controller.schedules.items():
        if not torch.equal(controller.bsr_state[name].cpu(), schedule.pack()):
            schedule.unpack(controller.bsr_state[name])


__all__ = ["STATE", "ALaSTController"]
