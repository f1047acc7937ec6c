"""Blocks whose halves are compiled as functions, for plans that change from step to step.

What depends on the plan (which tokens are kept, what trains) runs outside of the functions. All blocks share the two
functions. Sequence lengths are symbolic, so another length is not compiled again; another graph is, such as that of a
frozen block or of the first trained one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec, SideInputHooks
from peft_bsr.core import BlockCall
from peft_bsr.engine.bound import modules_of
from peft_bsr.engine.traced import TracedBlock, attention_half, half_readers, mlp_half
from peft_bsr.engine.watch import Watch

_MOST_GRAPHS = 64  # for each function: blocks may differ in their DropPath rate


@dataclass(frozen=True)
class Compiler:
    """How halves are compiled.

    Attributes:
        mode: See `torch.compile`.
        backend: See `torch.compile`.
    """

    mode: str | None = None
    backend: str | Callable[..., object] = "inductor"


class CompiledBlock(TracedBlock):
    """The compiled halves of a block without hooks of the user.

    Args:
        block: The block.
        spec: Description of the model.
        side_input_hooks: Selects the alive tokens' part of side inputs.
        own: Objects whose hooks on the block are ignored, because they are this package's.
        compiler: Settings of `torch.compile`.

    Attributes:
        watch: Detects changes after which the block must be looked up again.
    """

    readers = ("", "", "")

    def __init__(
        self,
        block: nn.Module,
        spec: ModelSpec,
        side_input_hooks: SideInputHooks,
        own: tuple[object, ...],
        compiler: Compiler,
    ) -> None:
        super().__init__(block, spec, side_input_hooks)
        self.reasons = {}
        self.run_attention, self.run_mlp = _halves(compiler)
        self.watch = Watch(modules_of(block, own), (side_input_hooks, *own))

    def adapted(self, call: BlockCall) -> BlockCall:
        """The call as the halves need it. They do not read the route, which differs between blocks."""
        return call.traced(is_gathered=True)

    def _arguments(
        self, call: BlockCall, tokens: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> dict[str, object]:
        return self.side_input_hooks.gather_on(call.route, super()._arguments(call, tokens, args, kwargs))


def halves_obstacle(
    block: nn.Module, spec: ModelSpec, side_input_hooks: SideInputHooks, own: tuple[object, ...]
) -> str | None:
    """Why the halves of a block cannot be compiled, or None.

    Args:
        block: The block.
        spec: Description of the model.
        side_input_hooks: Selects the alive tokens' part of side inputs.
        own: Objects whose hooks on the block are ignored, because they are this package's.
    """
    if spec.block_spec is None:
        return "its parts are not known"
    if side_input_hooks.biases(block):
        return "it makes position biases of all tokens"
    return next(filter(None, half_readers(block, spec, (side_input_hooks, *own))[1:]), None)


@cache
def _halves(compiler: Compiler) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    """The two functions that all blocks share."""
    settings: dict[str, Any] = {"mode": compiler.mode, "backend": compiler.backend, "dynamic": True, "fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not before torch 2.13
        settings["recompile_limit"] = _MOST_GRAPHS
    return torch.compile(attention_half, **settings), torch.compile(mlp_half, **settings)


__all__ = ["CompiledBlock", "Compiler", "halves_obstacle"]
