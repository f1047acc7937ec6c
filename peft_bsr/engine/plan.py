"""The Plan: what is done to each block. Immutable; it can be printed and compared, and its cost estimated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft_bsr.core import ScoreKind, num_kept

ReduceAt = Literal["mid_block", "after_block"]
Mode = Literal["compact", "full_view"]


@dataclass(frozen=True)
class Reduction:
    """Token reduction at one block.

    Attributes:
        keep_rate: Share of the non-special tokens that are kept, in (0, 1].
        fuse: Whether to append the weighted sum of the dropped tokens as one token.
        position: `"mid_block"` = after attention and its residual, so that the block's MLP gets fewer tokens;
            `"after_block"` = on the block's output.
        score: How tokens are ranked, see `peft_bsr.core.token_scores`. None: the most similar tokens are merged instead
            of dropped, see `peft_bsr.core.merge_tokens`.
        of_all: Whether `keep_rate` applies to all tokens including special ones, rounded down (ALaST); special tokens
            are kept in addition. False: it applies to non-special tokens, rounded up (BSR).
        share: Number of tokens after this block divided by that at the first block, including special tokens, rounded
            to a multiple of `multiple`. Replaces `keep_rate`. None = `keep_rate` applies.
        multiple: Sequence lengths are rounded to multiples of this, if the input is longer.
    """

    keep_rate: float
    fuse: bool = True
    position: ReduceAt = "mid_block"
    score: ScoreKind | None = "class"
    of_all: bool = False
    share: float | None = None
    multiple: int = 1
    _rate: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # torch.compile makes a number symbolic once it changes; a string stays constant
        object.__setattr__(self, "_rate", repr(float(self.keep_rate)))

    @property
    def merges(self) -> bool:
        """Whether tokens are merged instead of dropped."""
        return self.score is None

    def keep(self, competing: int, num_special: int, at_start: int) -> int:
        """Number of non-special tokens that are kept, K.

        Args:
            competing: Number of non-special tokens, M.
            num_special: Number of special tokens, P + S.
            at_start: Number of tokens at the first block, including special ones.
        """
        if self.share is not None:
            length = self.multiple * round(self.share * int(at_start) / self.multiple)
            return min(competing, max(1, length - num_special))
        if self.of_all:
            return min(competing, max(1, math.floor(round(float(self._rate) * int(competing + num_special), 6))))
        return num_kept(float(self._rate), competing)

    def count_after(self, num_tokens: int, num_special: int, at_start: int | None = None) -> int:
        """Tokens left of `num_tokens`, with special and fused ones. `at_start`: those at the first block."""
        competing = num_tokens - num_special
        kept = self.keep(competing, num_special, num_tokens if at_start is None else at_start)
        return num_special + kept + (1 if self.fuse and kept < competing else 0)


@dataclass(frozen=True)
class GradientTokens:
    """Which tokens carry gradients. The others run without a graph.

    Attributes:
        share: Share of the non-special tokens, in (0, 1), rounded up. Special tokens always carry gradients.
        score: The score by which the best tokens are selected, see `peft_bsr.core.token_scores`. None = a new random
            draw in each step.
    """

    share: float
    score: ScoreKind | None = "class"


@dataclass(frozen=True)
class Lean:
    """What a block does not keep for backward, limited to what passed the self-test. See `peft_bsr.engine.halves`.

    Attributes:
        attention: Whether the attention's norm and projections run lean.
        mlp: Whether the MLP and its norm run lean.
        save_products: Whether to keep the outputs of the MLP's first Linear and of the projections (`lean="exact"`)
            instead of recomputing them (`"max"`).
        num_queries: Number of tokens at the front that the head reads, if the last block runs queries, output
            projection and MLP for those alone, else None. For these few, the MLP's first product is always recomputed.
        as_modules: Whether the attention runs as the block's own modules, because its parts are not known: with
            `save_products` its projections keep the norm's input, otherwise it runs twice.
    """

    attention: bool = True
    mlp: bool = True
    save_products: bool = True
    num_queries: int | None = None
    as_modules: bool = False


@dataclass(frozen=True)
class BlockPlan:
    """What is done to one block.

    Attributes:
        trained: Whether any of its weights train.
        cut_gradient: Whether its input is detached in training, because nothing before it trains.
        reduction: Token reduction, or None.
        lean: What it does not keep for backward, or None for the original block.
        int8: Whether it keeps the other activations in int8, see `peft_bsr.engine.int8`.
        mixture: Whether its controller's mixture of experts replaces its MLP.
        gradient_tokens: Which of its tokens carry gradients, or None for all. On a block without gradients: the block
            ranks the tokens for the next one.
    """

    trained: bool = False
    cut_gradient: bool = False
    reduction: Reduction | None = None
    lean: Lean | None = None
    int8: bool = False
    mixture: bool = False
    gradient_tokens: GradientTokens | None = None

    @property
    def saves_less(self) -> bool:
        """Whether it keeps less for backward than the original block."""
        return self.lean is not None or self.int8

    @property
    def in_graph(self) -> bool:
        """Whether gradients reach the block."""
        return self.trained or not self.cut_gradient


@dataclass(frozen=True)
class Plan:
    """What is done to every block of a ModelSpec.

    Attributes:
        blocks: One plan per block.
        mode: `"compact"` = the sequence gets shorter, from the first reduction to the head; `"full_view"` = it keeps
            its length outside of the blocks: each block runs on the tokens that are left, and dropped tokens keep
            their last value.
        notes: Settings that were left out because they would change this model's results, with the reason.
        reduces: Whether any block drops or merges tokens.
        merges: Whether any block merges tokens.

    Examples:
        >>> plan = Plan.static(12, trained=[3, 7, 11], reductions={i: Reduction(0.5) for i in (3, 6, 9)})
        >>> [mlp for _, mlp in plan.token_counts(197, 1)][::3]
        [197, 100, 52, 28]
    """

    blocks: tuple[BlockPlan, ...]
    mode: Mode = "compact"
    notes: tuple[str, ...] = field(default=(), compare=False)
    reduces: bool = field(init=False, compare=False, repr=False)
    merges: bool = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        reductions = [block.reduction for block in self.blocks if block.reduction is not None]
        object.__setattr__(self, "reduces", bool(reductions))
        object.__setattr__(self, "merges", any(reduction.merges for reduction in reductions))

    @classmethod
    def static(cls, depth: int, trained: list[int], reductions: dict[int, Reduction], mode: Mode = "compact") -> Plan:
        """A plan that is the same in every step. The gradient is cut at the input of the first trained block.

        Args:
            depth: Number of blocks.
            trained: Indices of the blocks that train, at least one.
            reductions: Block index -> reduction.
            mode: `"compact"` or `"full_view"`. Default `"compact"`.
        """
        first = min(trained)
        return cls(tuple(BlockPlan(i in trained, i <= first, reductions.get(i)) for i in range(depth)), mode)

    def with_reductions(self, mode: Mode | None = None, **changes: Any) -> Plan:
        """A copy with changed fields in all reductions (`keep_rate` resets `share`), and with another mode if given."""
        if "keep_rate" in changes:
            changes.setdefault("share", None)
        blocks = tuple(replace(b, reduction=b.reduction and replace(b.reduction, **changes)) for b in self.blocks)
        return replace(self, blocks=blocks, mode=mode or self.mode)

    def without_reductions(self) -> Plan:
        """A copy that keeps all tokens."""
        return replace(self, blocks=tuple(replace(block, reduction=None) for block in self.blocks))

    def without_cuts(self) -> Plan:
        """A copy in which gradients reach the embeddings."""
        return replace(self, blocks=tuple(replace(block, cut_gradient=False) for block in self.blocks))

    def with_lean(self, lean: Lean | None) -> Plan:
        """A copy whose blocks in the graph run lean. The others keep nothing for backward."""
        return replace(self, blocks=tuple(replace(b, lean=lean if b.in_graph else None) for b in self.blocks))

    def with_all_queries(self) -> Plan:
        """A copy whose last block has gradients of all its output, not only of the tokens that the head reads."""
        last = self.blocks[-1]
        lean = None if last.lean is None else replace(last.lean, num_queries=None)
        return replace(self, blocks=(*self.blocks[:-1], replace(last, lean=lean)))

    def with_int8(self, int8: bool) -> Plan:
        """A copy whose blocks in the graph keep activations in int8."""
        return replace(self, blocks=tuple(replace(block, int8=int8 and block.in_graph) for block in self.blocks))

    def with_gradient_tokens(self, tokens: GradientTokens | None) -> Plan:
        """A copy whose blocks in the graph have gradients only for these tokens. The block before them ranks them."""
        first = next((i for i, block in enumerate(self.blocks) if block.in_graph), len(self.blocks))
        first -= tokens is not None and tokens.score is not None
        blocks = (replace(b, gradient_tokens=tokens if i >= first else None) for i, b in enumerate(self.blocks))
        return replace(self, blocks=tuple(blocks))

    def with_mixtures(self) -> Plan:
        """A copy whose trained blocks run mixtures of experts instead of their MLPs."""
        return replace(self, blocks=tuple(replace(block, mixture=block.trained) for block in self.blocks))

    @property
    def trained_blocks(self) -> list[int]:
        """Indices of the blocks that train, ascending."""
        return [i for i, block in enumerate(self.blocks) if block.trained]

    @property
    def cuts_gradient(self) -> bool:
        """Whether the gradient is cut at a block."""
        return any(block.cut_gradient for block in self.blocks)

    def token_counts(self, num_tokens: int, num_special: int) -> list[tuple[int, int]]:
        """(tokens in the attention, tokens in the MLP) of every block.

        Args:
            num_tokens: Number of tokens at the first block, including special ones, N.
            num_special: Number of tokens that are never dropped, P + S.
        """
        counts, at_start = [], num_tokens
        for block in self.blocks:
            after = block.reduction.count_after(num_tokens, num_special, at_start) if block.reduction else num_tokens
            mid = block.reduction is not None and block.reduction.position == "mid_block"
            counts.append((num_tokens, after if mid else num_tokens))
            num_tokens = after
        return counts

    def describe(self, num_tokens: int, num_special: int) -> str:
        """The mode, then one line per block: what it does, and the number of tokens in its attention and its MLP."""
        scores = sorted({b.reduction.score for b in self.blocks if b.reduction and b.reduction.score})
        lines = [f"{self.mode}, tokens ranked by {' and '.join(scores)}"] if scores else []
        lines += [f"{self.mode}, similar tokens merged"] if self.merges else []
        lines += ["block  weights  attention  MLP tokens"]
        for index, (block, (attention, mlp)) in enumerate(
            zip(self.blocks, self.token_counts(num_tokens, num_special), strict=True)
        ):
            lines.append(f"{index:>5}  {'trained' if block.trained else 'frozen':<7}  {attention:>9}  {mlp:>10}")
        return "\n".join(lines)
