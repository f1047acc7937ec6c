"""What blocks hand to each other within one forward."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from peft_bsr.core.gradient_tokens import TokenSplit
from peft_bsr.core.route import ResumePoint, Route, TaskCall
from peft_bsr.errors import ForwardError

BLOCKS = "blocks"  # owner of a forward that no hook saw begin


class BlockCall:
    """One block's forward in progress: what it is asked, and what it leaves behind.

    Hooks, output capture and checkpointing around a block expect what the stock block returns, so the origins do not
    leave it by the return value. A recomputed block (gradient checkpointing) gets the call of its own forward.

    Args:
        route: Tokens alive in it.
        score: Kind of token score that its attention is asked for, or None.
        plan: The block's plan.
        lean: Which halves run lean in this forward and how, or None.
        int8: Whether it keeps in 8 bits what it keeps in this forward.
        is_traced: Whether a compiler sees the call: then the block's forward sets nothing, in the call or around it
            (it may be a region that the compiler checkpoints), and gives the origins after what it gives.
        is_gathered: Whether what the attention is called with speaks of the alive tokens alone already.
        splits: Whether some tokens carry no gradients in this forward.
        split: Which, as the block before left it; None = all carry them, or nobody has chosen yet.

    Attributes:
        admit: Told that square matrices are tokens, not attention weights, where these are kept in 8 bits; else None.
        token_scores: The scores [B, N], once the attention has run.
        origins: Origins after the block's reduction [B, A], or None without one.
        merged: What each patch is part of after it [B, M], or None where nothing is merged.
        split_after: Which tokens carry no gradients after the block.
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

    def note(self, left: Sequence[Tensor]) -> None:
        """Keep what the block's reduction left: origins, and where it merges, what each patch is part of."""
        self.origins, self.merged = (*left, None, None)[:2]

    @property
    def num_queries(self) -> int | None:
        """How many tokens ask the others, in a compiled block whose attention runs as a module; None = all."""
        return self.lean.num_queries if self.is_traced and self.lean is not None else None

    def traced(self, is_gathered: bool = False) -> BlockCall:
        """The same call where a compiler sees it."""
        return BlockCall(self.route, self.score, self.plan, self.lean, self.int8, True, is_gathered)


class Forward:
    """The forward that runs in one thread, see `ForwardContext`.

    Attributes:
        owner: What opened the running forward; None = no forward runs.
        route: The running forward's route, between blocks.
        running: The call of the block that runs right now, for what its attention is called with.
        split: Which tokens carry no gradients, between blocks; None = all carry them, or nobody has chosen yet.
        reading: What a query path made of the blocks so far, between blocks and up to its head.
        call: What the running forward is asked, in a model with tasks.
        resume_point: Where the next forward stops or begins, see `peft_bsr.engine.resume`.
        recorders: Called with (block index, route after it) after each reduction.
        usage: Where `record_usage` collects tokens of each task and expert, by block.
        has_warned: Whether it was said that a block planned lean runs stock.
        outside: Watches the model around its blocks, from the latest forward of the whole model on.
    """

    def __init__(self) -> None:  # class attributes would fail torch.compile's guards
        self.owner: Any = None
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

    def open(self, owner: Any) -> bool:
        """A forward of `owner` begins; one inside another changes nothing.

        Args:
            owner: A module, or `BLOCKS` where no hook saw that a forward began: the first block's call begins one then.

        Returns:
            Whether it is the outermost.
        """
        if self.owner not in (None, BLOCKS, owner):  # its own is there if an interrupt ended the forward before
            return False
        self.owner, self.route, self.running, self.split, self.reading = owner, None, None, None, None
        return True

    def close(self, owner: Any) -> None:
        """The forward of `owner` has ended, in whatever way."""
        if self.owner is owner:
            self.owner = self.route = self.running = self.split = self.reading = None

    def clear(self) -> None:
        """The running forward ends in the middle."""
        self.owner = self.route = self.running = self.split = self.reading = self.call = None

    def current(self) -> Route:
        """The running forward's route.

        Raises:
            ForwardError: If a block was called on its own, outside of the model's forward.
        """
        if self.route is None:
            raise ForwardError(
                "a block of a model with an adapter ran outside of the model's forward. Call the model; and if this is "
                "a backward pass, gradient checkpointing wraps the block's call (timm's does), where no route reaches "
                "the recomputation: switch it off, or set `keep_rate=1.0`"
            )
        return self.route

    def reduced(self, index: int, origins: Tensor, merged: Tensor | None = None) -> None:
        """Block `index` has left the tokens of `origins` [B, A], of which the patches are part by `merged` [B, M]."""
        self.route = route = self.current().reduced(origins, merged)
        for recorder in self.recorders:
            recorder(index, route)

    def resume(self, point: ResumePoint) -> None:
        """The forward goes on in the middle, on the route that earlier blocks left."""
        if self.route is not None:
            left = {"origins": point.origins, "num_reductions": point.num_reductions, "merged": point.merged}
            self.route = replace(self.route, **left)  # type: ignore[arg-type]


class ForwardContext(threading.local):
    """The running forward of a model, one per thread (nn.DataParallel).

    Hooks of the model open it and close it, also after an exception, so that nothing is left of a forward but its
    outputs. A recomputed block (gradient checkpointing) does not look here: it gets the call of its own forward.

    Attributes:
        now: This thread's forward; an object of its own, because torch.compile loses what is set on a thread-local.
    """

    def __init__(self) -> None:  # runs in every thread
        self.now = Forward()

    def __reduce__(self) -> tuple[type[ForwardContext], tuple[()]]:  # copies and pickles start empty
        return ForwardContext, ()


__all__ = ["BLOCKS", "BlockCall", "Forward", "ForwardContext"]
