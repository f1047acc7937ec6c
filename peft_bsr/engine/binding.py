"""Which way a block's parts are looked up: taken apart, compiled as functions, or inside of its own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from peft_bsr.engine.bound import BoundBlock
from peft_bsr.engine.compiled import CompiledBlock
from peft_bsr.engine.staged import StagedBlock, WholeBlock

if TYPE_CHECKING:
    from peft_bsr.engine.controller import BlockController

Bound = BoundBlock | StagedBlock


def bind(block: nn.Module, controller: BlockController) -> Bound:
    """The block's parts, looked up now.

    Args:
        block: The block.
        controller: Its controller.
    """
    spec, own, hooks = controller.spec, (controller, controller.scorer), controller.side_input_hooks
    if spec.stage_blocks:
        return StagedBlock(block, spec, spec.stage_blocks[controller.index], own, controller.step_aside)
    if controller.compiler is not None and controller.halves_obstacle() is None:
        return CompiledBlock(block, spec, hooks, own, controller.compiler)
    bound_class = BoundBlock if spec.whole_block is None else WholeBlock
    return bound_class(block, spec, hooks, own, controller.step_aside)


__all__ = ["Bound", "bind"]
