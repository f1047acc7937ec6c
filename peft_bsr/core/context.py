"""The state of a running forward: what its blocks pass to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from peft_bsr.core.gradient_tokens import TokenSplit
from peft_bsr.core.route import ResumePoint, Route, TaskCall
from peft_bsr.errors import ForwardError

BLOCKS = "blocks"  # owner of a forward that begins at the first block, without a hook of the model
_OUTSIDE = (
    "a block of a model with an adapter ran outside of the model's forward. Call the model. If this is a backward "
    "pass, gradient checkpointing wraps the block's call (as timm does), so the recomputation has no route: disable "
    "it, or set `keep_rate=1.0` and `gradient_tokens=1.0`."
)


class BlockCall:
    """One call of a block: its settings and its results.

    Hooks, output capture and checkpointing around a block expect the output of the stock block, so the origins are not
    part of its return value. A block that is recomputed (gradient checkpointing) gets the call of its first forward.

    Args:
        route: Route of the block's input.
        score: Kind of token score to compute in the attention, or None.
        plan: The block's `BlockPlan`.
        lean: Settings of the halves that run lean in this forward (`Lean`), or None.
        int8: Whether activations are kept for backward in int8 in this forward.
        is_traced: Whether a compiler traces the call. The block's forward then sets no attributes, because the compiler
            may checkpoint it, and returns the origins after its outputs.
        is_gathered: Whether the arguments of the attention are already limited to the alive tokens.
        splits: Whether some tokens carry no gradients in this forward.
        split: The tokens with and without gradients before the block; None = all carry them, or none was chosen yet.

    Attributes:
        admit: Called with True where square matrices are tokens, not attention weights, if activations are kept in
            int8; else None.
        token_scores: Token scores [B, N], set by the attention.
        origins: Origins after the block's reduction, [B, A]. None without a reduction.
        merged: `Route.merged` after the reduction, [B, M]. None if nothing is merged.
        split_after: The tokens with and without gradients after the block.
        stand_ins: Module of the block -> what its forward calls instead; see `peft_bsr.engine.staged`.
    """

    __slots__ = (
        "admit",
        "int8",
        "is_gathered",
        "is_traced",
        "lean",
        "merged",
        "origins",
        "plan",
        "route",
        "score",
        "split",
        "split_after",
        "splits",
        "stand_ins",
        "token_scores",
    )

    def __init__(
        self,
        route: Route,
        score: str | None = None,
        plan: Any = None,
        lean: Any = None,
        int8: bool = False,
        is_traced: bool = False,
        is_gathered: bool = False,
        splits: bool = False,
        split: TokenSplit | None = None,
    ) -> None:
        self.route, self.score = route, score
        self.plan, self.lean, self.int8 = plan, lean, int8
        self.is_traced, self.is_gathered = is_traced, is_gathered
        self.splits, self.split, self.split_after = splits, split, split
        self.admit: Callable[[bool], None] | None = None
        self.token_scores: Tensor | None = None
        self.origins: Tensor | None = None
        self.merged: Tensor | None = None
        self.stand_ins: Mapping[Any, Callable[..., Any]] = {}

    def note(self, left: Sequence[Tensor]) -> None:
        """Set the results of the block's reduction: `origins`, and `merged` if it merges."""
        self.origins, self.merged = (*left, None, None)[:2]

    @property
    def num_queries(self) -> int | None:
        """Number of tokens with queries, in a compiled block whose attention runs as a module. None = all."""
        return self.lean.num_queries if self.is_traced and self.lean is not None else None

    def traced(self, is_gathered: bool = False) -> BlockCall:
        """A copy of this call with `is_traced`."""
        return BlockCall(self.route, self.score, self.plan, self.lean, self.int8, True, is_gathered)


class Forward:
    """The running forward of one thread, see `ForwardContext`.

    Attributes:
        owner: The module that opened the running forward, or `BLOCKS`. None = no forward runs.
        route: The route, between blocks.
        running: The call of the block that is running now, for the arguments of its attention.
        split: The tokens with and without gradients, between blocks; None = all carry them, or none was chosen yet.
        reading: The state of a side network or of learned queries, between blocks and up to the head.
        call: Tasks of the running forward, in a model with tasks.
        resume_point: Where the next forward stops or starts, see `peft_bsr.engine.resume`.
        recorders: Functions of (block index, route after it), called after each reduction.
        usage: Block index -> tokens per task and expert, collected by `record_usage`.
        has_warned: Whether a warning was given that a block planned as lean runs as the original.
        outside: `Watch` of the modules around the blocks, set by each forward of the whole model.
    """

    def __init__(self) -> None:  # class attributes would fail torch.compile's guards
        self.owner: object = None
        self.route: Route | None = None
        self.running: BlockCall | None = None
        self.split: TokenSplit | None = None
        self.reading: Any = None
        self.call: TaskCall | None = None
        self.resume_point: ResumePoint | None = None
        self.recorders: list[Callable[[int, Route], None]] = []
        self.usage: dict[int, Tensor] | None = None
        self.has_warned = False
        self.outside: Any = None

    def open(self, owner: object) -> bool:
        """Begin a forward. Does nothing inside of another forward.

        Args:
            owner: The module whose forward begins, or `BLOCKS` if the first block is called outside of a forward.

        Returns:
            Whether it is the outermost forward.
        """
        if self.owner not in (None, BLOCKS, owner):  # `owner` itself if an interrupt ended its last forward
            return False
        self.owner, self.route, self.running, self.split, self.reading = owner, None, None, None, None
        return True

    def close(self, owner: object) -> None:
        """End the forward of `owner`, also after an error."""
        if self.owner is owner:
            self.owner = self.route = self.running = self.split = self.reading = None

    def clear(self) -> None:
        """Discard the running forward, after an interrupt."""
        if self.call is not None:
            self.call.close()
        self.owner = self.route = self.running = self.split = self.reading = self.call = None

    def current(self) -> Route:
        """The route of the running forward.

        Raises:
            ForwardError: If a block was called outside of the model's forward.
        """
        if self.route is None:
            raise ForwardError(_OUTSIDE)
        return self.route

    def current_split(self) -> TokenSplit | None:
        """The split of the running forward; None = all tokens carry gradients, or none was chosen yet.

        Raises:
            ForwardError: If a block was called outside of the model's forward.
        """
        if self.owner is None:
            raise ForwardError(_OUTSIDE)
        return self.split

    def reduced(self, index: int, origins: Tensor, merged: Tensor | None = None) -> None:
        """Update the route after the reduction of block `index`: `origins` [B, A], and `merged` [B, M] if it merges."""
        self.route = route = self.current().reduced(origins, merged)
        for recorder in self.recorders:
            recorder(index, route)

    def resume(self, point: ResumePoint) -> None:
        """Continue a forward at `point`, on the route after the earlier blocks."""
        if self.route is not None:
            self.route = replace(
                self.route, origins=point.origins, num_reductions=point.num_reductions, merged=point.merged
            )


class ForwardContext(threading.local):
    """The running forward of a model, one per thread (nn.DataParallel).

    Hooks of the model open and close it, also after an exception, so that only the outputs of a forward are left. A
    block that is recomputed (gradient checkpointing) does not use it: it gets the call of its first forward.

    Attributes:
        now: The forward of this thread. A separate object, because torch.compile loses attributes of a thread-local.
    """

    def __init__(self) -> None:  # runs in every thread
        self.now = Forward()

    def __reduce__(self) -> tuple[type[ForwardContext], tuple[()]]:  # copies and pickles are empty
        return ForwardContext, ()


__all__ = ["BLOCKS", "BlockCall", "Forward", "ForwardContext"]
