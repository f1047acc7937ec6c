"""Blocks whose halves are compiled as functions, for plans that are another one in each step.

What the plan says (which tokens stay, who trains) runs outside of them. All blocks share the two functions, and lengths
are symbols in them: a compiler starts again for what is another graph, such as a frozen block or the first that trains,
and not for another length.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peft_bsr.backbones import ModelSpec, SideInputHooks
from peft_bsr.core import BlockCall
from peft_bsr.engine.bound import modules_of
from peft_bsr.engine.traced import TracedBlock, attention_half, half_readers, mlp_half
from peft_bsr.engine.watch import Watch

_MOST_GRAPHS = 64  # of each function: blocks may differ in a rate of drop path


@dataclass(frozen=True)
class Compiler:
    """How halves are compiled.

    Attributes:
        mode: See `torch.compile`.
        backend: See `torch.compile`.
    """

    mode: str | None = None
    backend: Any = "inductor"


class CompiledBlock(TracedBlock):
    """The halves of a block that nothing looks at, compiled.

    Args:
        block: The block.
        spec: Knows its parts.
        side_input_hooks: Selects the alive tokens' part of side inputs.
        own: Objects whose hooks on the block are our own.
        compiler: How.

    Attributes:
        watch: Whether all this still holds.
    """

    readers = ("", "", "")

    def __init__(
        self, block: Any, spec: ModelSpec, side_input_hooks: SideInputHooks, own: tuple[Any, ...], compiler: Compiler
    ) -> None:
        super().__init__(block, spec, side_input_hooks)
        self.reasons = {}
        self.run_attention, self.run_mlp = _halves(compiler)
        self.watch = Watch(modules_of(block, own), (side_input_hooks, *own))

    def asked(self, call: BlockCall) -> BlockCall:
        """The call as the halves need it: they look at no route, since no two blocks have the same."""
        return call.traced(is_gathered=True)

    def _arguments(
        self, call: BlockCall, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        return self.side_input_hooks.gather_on(call.route, super()._arguments(call, tokens, args, kwargs))


def halves_obstacle(block: Any, spec: ModelSpec, side_input_hooks: SideInputHooks, own: tuple[Any, ...]) -> str | None:
    """Why the halves of a block cannot be compiled, or None.

    Args:
        block: The block.
        spec: Knows its parts.
        side_input_hooks: Selects the alive tokens' part of side inputs.
        own: Objects whose hooks on the block are our own.
    """
    if spec.block_spec is None:
        return "its parts are not known"
    if side_input_hooks.biases(block):
        return "it makes position biases of all tokens"
    hook = next(filter(None, half_readers(block, spec, (side_input_hooks, *own))[1:]), None)
    return hook and f"the hook {hook} looks at its modules"


@cache
def _halves(compiler: Compiler) -> tuple[Any, Any]:
    """The two functions that all blocks share."""
    settings: dict[str, Any] = {"mode": compiler.mode, "backend": compiler.backend, "dynamic": True, "fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # not before torch 2.13
        settings["recompile_limit"] = _MOST_GRAPHS
    return torch.compile(attention_half, **settings), torch.compile(mlp_half, **settings)


__all__ = ["CompiledBlock", "Compiler", "halves_obstacle"]
