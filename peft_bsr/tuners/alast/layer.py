"""The block controller of ALaST, which follows the plan of the current step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_bsr.backbones import FamilyRule, ModelSpec
from peft_bsr.compat.peft_api import BufferDict
from peft_bsr.core import ForwardContext
from peft_bsr.engine import Plan
from peft_bsr.tuners.alast.schedule import ALaSTSchedule
from peft_bsr.tuners.blocks.controller import MergeableController

if TYPE_CHECKING:
    from peft_bsr.engine.runner import ControlledBlock

STATE = "bsr_state"


class ALaSTController(MergeableController):
    """A block controller whose plan comes from the schedule in training. In evaluation the model runs unchanged.

    The first block's controller saves and loads the state of the schedules in buffers that appear only in state dicts,
    `bsr_state.<adapter>`, because torch's distributed checkpoints hold only parameters and buffers.

    Args:
        index, spec, context, rule: See `BlockController`.
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
        """The schedule of the active adapter, or None if adapters are disabled."""
        name = self.carried_adapter
        return None if name is None else self.schedules[name]

    @property
    def plan(self) -> Plan | None:
        """The plan of the current step, or None in evaluation and before the first step."""
        schedule = self.schedule
        return schedule.plan if schedule is not None and self.training else None

    def call(
        self, block: ControlledBlock, run: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor | tuple[Any, ...]:
        """Call the block. In training `torch.compile` does not trace it, because the plan changes in each step.

        Blocks that are compiled one by one (`block.compile()`) stay compiled.
        """
        if self.training and torch.compiler.is_compiling():
            return self._call_untraced(block, run, args, kwargs)
        return super().call(block, run, args, kwargs)

    @torch.compiler.disable
    def _call_untraced(self, *args: Any) -> Tensor | tuple[Any, ...]:
        return super().call(*args)

    def begin(self) -> None:
        """Notify the schedule that a training forward begins."""
        if self.training and torch.is_grad_enabled() and (schedule := self.schedule) is not None:
            schedule.begin()

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Pass the tokens before and after the block to the schedule."""
        if self.training and torch.is_grad_enabled() and (schedule := self.schedule) is not None:
            schedule.observe(before, after, self.spec.num_prefix)

    def side_effect_free(self) -> AbstractContextManager[None]:
        """Context manager: forwards inside do not change the budgets or the selection."""
        return nullcontext() if self.schedule is None else self.schedule.side_effect_free()

    def add_schedule(self, adapter_name: str, schedule: ALaSTSchedule) -> None:
        """Add the schedule of an adapter. The controllers of all blocks share it."""
        self.schedules[adapter_name] = schedule
        if self.index == 0:
            self.bsr_state[adapter_name] = schedule.pack()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter."""
        super().delete_adapter(adapter_name)
        if self.schedules.pop(adapter_name, None) is not None and self.index == 0:
            del self.bsr_state[adapter_name]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state dict, with the current state of the schedules."""
        _write_states(self)
        return super().state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return f"alast.ALaSTController(block={self.index}, schedules={sorted(self.schedules)})"


def _write_states(controller: ALaSTController, *_: object) -> None:
    """Write the state of each schedule to its buffer."""
    for name, schedule in controller.schedules.items() if controller.index == 0 else ():
        controller.bsr_state[name] = schedule.pack().to(controller.bsr_state[name].device)


def _read_states(controller: ALaSTController, _: object) -> None:
    """Restore each schedule whose buffer was loaded, that is, differs from what `_write_states` wrote."""
    for name, schedule in controller.schedules.items():
        if not torch.equal(controller.bsr_state[name].cpu(), schedule.pack()):
            schedule.unpack(controller.bsr_state[name])


__all__ = ["STATE", "ALaSTController"]
