"""The blocks to train under a memory budget, by what each contributes: an exact search over sets of blocks and tokens.

With lean blocks what is kept for backward depends on the first trained block and on the tokens; what trains after it
adds its optimizer state, its copy of the weights and, at `lean="max"`, a little more that is kept. So for a given first
block the best set is a knapsack. Its bytes come from dry runs, and each set that is given was run dry itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_bsr.cost.block_contributions import Contributions
from peft_bsr.cost.estimation import Estimate
from peft_bsr.cost.proxy import on_meta, resolve_narrow
from peft_bsr.cost.setup import Setup
from peft_bsr.cost.ways import Way, tokens_of, ways_of
from peft_bsr.errors import ConfigError
from peft_bsr.tuners import BSRConfig

_SLACK = 0.03  # of the budget: sets that the sum of bytes finds so much too large are run dry all the same
_TRIES = 24
_Blocks = tuple[int, ...]
_Tried = tuple[Way, list[str]]


@dataclass(frozen=True)
class Choice:
    """What one form and one lean level can do best.

    Attributes:
        way: How to train.
        share: What it gains of what all blocks on all tokens would gain in the same form.
    """

    way: Way
    share: float


def choices(
    model: nn.Module,
    found: Contributions,
    setup: Setup,
    dtype: torch.dtype,
    capacity: float,
    measure: Callable[[Way, list[str]], Estimate],
) -> Iterator[Choice]:
    """For whole weights and for low-rank updates, at each lean level: the set of blocks and the tokens that gain most.

    A block counts with the share of the tokens that it still sees. What leaner levels cannot better is left out.

    Args:
        model: On the meta device.
        found: What the blocks contribute.
        setup: How it is trained.
        dtype: Of the model's weights.
        capacity: Bytes that a plan may take.
        measure: What a way takes, given what was declined on the way to it; called a few times for each form and level.

    Raises:
        ConfigError: If the contributions are of another model.
    """
    spec = resolve_narrow(on_meta(model, setup.image_size), BSRConfig()).spec
    if found.depth != spec.depth:
        raise ConfigError(
            f"`contributions` are of {found.depth} blocks, but {type(model).__name__} has {spec.depth}. Measure them "
            "on this model."
        )
    tokens = []
    for fields, given_up in tokens_of(spec.depth):
        plan = BSRConfig(trainable_blocks="every:1", **fields).plan_for(spec)
        counts = plan.token_counts(spec.num_tokens, spec.num_special)
        tokens.append(_Tokens(fields, given_up, [sum(pair) / 2 / spec.num_tokens for pair in counts]))
    levels = len(_ways(spec.depth, (0,), tokens[0], "full", setup, dtype))
    for form in ("full", "lora"):
        gains, best = found.of_blocks(form)[: spec.last_read + 1], 0.0
        for level in range(levels if sum(gains) else 0):

            def way(blocks: _Blocks, seen: _Tokens, form: str = form, level: int = level) -> _Tried:
                return _ways(spec.depth, blocks, seen, form, setup, dtype)[level]

            choice = _Search(gains, tokens, capacity, way, lambda tried: measure(*tried)).run() if best < 1 else None
            if choice is not None and choice[1] > best:
                best = choice[1]
                yield Choice(choice[0][0], best)


@dataclass(frozen=True)
class _Tokens:
    """Where tokens are dropped, what that gives up, and the share of them that each block sees."""

    fields: dict[str, Any]
    given_up: str
    shares: list[float]


@dataclass
class _Search:
    """One form at one lean level."""

    gains: list[float]
    tokens: list[_Tokens]
    capacity: float
    way: Callable[[_Blocks, _Tokens], Any]
    measure: Callable[[Any], Estimate]

    def run(self) -> tuple[Any, float] | None:
        """The best way that fits and its share of what all blocks on all tokens gain, or None."""
        depth, everything = len(self.gains), self.tokens[0]
        way = self.way(tuple(range(depth)), everything)
        most = self.measure(way)
        if most.total_bytes <= self.capacity:
            return way, 1.0
        first = self.measure(self.way((0,), everything))
        # bytes of a block that trains beside those of one that gradients cross: kept for backward, and the rest
        more = max(0, most.saved_bytes - first.saved_bytes) / max(1, depth - 1)
        fixed = max(0.0, (most.total_bytes - first.total_bytes) / max(1, depth - 1) - more)
        crossed = (first.saved_bytes - more) / depth
        errors: dict[tuple[int, int], float] = {}

        def bytes_before(start: int, shares: list[float]) -> float:
            """With the first block alone."""
            return first.total_bytes - crossed * (depth - sum(shares[start:depth])) - more * (1 - shares[start])

        for _ in range(_TRIES):
            best: tuple[float, int, _Blocks] | None = None
            for index, seen in enumerate(self.tokens):
                values = [gain * share for gain, share in zip(self.gains, seen.shares, strict=False)]
                weights = [fixed + more * share for share in seen.shares]
                for start in range(depth):
                    room = self.capacity * (1 + _SLACK) - bytes_before(start, seen.shares)
                    room -= errors.get((index, start), 0.0)
                    if room < 0:
                        continue
                    rest = best_set(values[start + 1 :], weights[start + 1 :], room)
                    blocks = (start, *(start + 1 + i for i in rest))
                    value = sum(values[i] for i in blocks)
                    if best is None or value > best[0]:
                        best = value, index, blocks
            if best is None:
                return None
            value, index, blocks = best
            way = self.way(blocks, self.tokens[index])
            took = self.measure(way).total_bytes
            if took <= self.capacity:
                return way, value / sum(self.gains)
            shares = self.tokens[index].shares
            summed = bytes_before(blocks[0], shares) + sum(fixed + more * shares[i] for i in blocks[1:])
            wrong = took - summed + self.capacity * _SLACK  # this set just does not fit any more
            errors[index, blocks[0]] = max(wrong, errors.get((index, blocks[0]), wrong))
        return None


def best_set(values: Sequence[float], weights: Sequence[float], capacity: float) -> _Blocks:
    """Indices of the set of most value whose weights do not exceed `capacity`, exactly (0/1 knapsack).

    Args:
        values: Of each thing, not negative.
        weights: Of each thing.
        capacity: Of all together.

    Examples:
        >>> best_set([6, 5, 5], [3, 2, 2], 4)
        (1, 2)
    """
    front: list[tuple[float, float, _Blocks]] = [(0.0, 0.0, ())]  # sets that no lighter one equals
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        with_it = [(w + weight, v + value, (*chosen, index)) for w, v, chosen in front]
        merged = sorted([*front, *(one for one in with_it if one[0] <= capacity)], key=lambda one: (one[0], -one[1]))
        front = []
        for one in merged:
            if not front or one[1] > front[-1][1]:
                front.append(one)
    return front[-1][2]


def _ways(depth: int, blocks: _Blocks, seen: _Tokens, form: str, setup: Setup, dtype: torch.dtype) -> list[_Tried]:
    """A way for each lean level, with what was declined before it."""
    named: Any = "every:1" if len(blocks) == depth else list(blocks)
    fields = {"trainable_blocks": named, **seen.fields, **({"trainable": "lora"} if form == "lora" else {})}
    what = "every block" if len(blocks) == depth else f"block {_in_words(blocks)}"
    trained = f"nothing but {'low-rank updates of ' if form == 'lora' else ''}{what} trains"
    declined: list[str] = []
    found: list[_Tried] = []
    for way in ways_of((fields, "; ".join(filter(None, (trained, seen.given_up)))), setup, dtype):
        if isinstance(way, str):
            declined.append(way)
        elif not way.setup.gradient_checkpointing:
            found.append((way, list(declined)))
    return found


def _in_words(blocks: _Blocks) -> str:
    """`3 to 5, 7` for 3, 4, 5, 7."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


__all__ = ["Choice", "best_set", "choices"]
