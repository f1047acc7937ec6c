"""Blocks whose halves are compiled as functions, for plans that are another one in each step.

What the plan says (which tokens stay, who trains) runs outside of them. All blocks share the two functions, and lengths
are symbols in them: a compiler starts again for what is another graph, such as a frozen block or the first that trains,
and not for another length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch

from peft_bsr.backbones import Column, TokenFollower
from peft_bsr.engine.bound import modules_of
from peft_bsr.engine.traced import TracedBlock, attention_half, half_readers, mlp_half
from peft_bsr.engine.watch import Watch


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
        column: Knows its parts.
        follower: Selects the alive tokens' part of side inputs.
        own: Objects whose hooks on the block are our own.
        compiler: How.

    Attributes:
        watch: Whether all this still holds.
    """

    readers = ("", "", "")
    reasons: ClassVar[dict[str, str]] = {}

    def __init__(
        self, block: Any, column: Column, follower: TokenFollower, own: tuple[Any, ...], compiler: Compiler
    ) -> None:
        super().__init__(block, column, follower)
        self.run_attention, self.run_mlp = _halves(compiler)
        self.watch = Watch(modules_of(block, own), (follower, *own))

    @staticmethod
    def obstacle(block: Any, column: Column, follower: TokenFollower, own: tuple[Any, ...]) -> str | None:
        """Why the halves cannot be compiled, or None."""
        if column.anatomy is None:
            return "its parts are not known"
        hook = next(filter(None, half_readers(block, column, (follower, *own))), None)
        return hook and f"the hook {hook} looks at its modules"


@cache
def _halves(compiler: Compiler) -> tuple[Any, Any]:
    """The two functions that all blocks share."""
    mode, backend = compiler.mode, compiler.backend
    first, second = (
        torch.compile(half, mode=mode, backend=backend, dynamic=True, fullgraph=True)
        for half in (attention_half, mlp_half)
    )
    return first, second


__all__ = ["CompiledBlock", "Compiler"]
