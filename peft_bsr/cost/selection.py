"""Selects the blocks to train under a memory budget by their contributions: a search over sets of blocks and tokens.

With lean blocks, the activations saved for backward depend on the first trained block and on the tokens. Every further
trained block adds optimizer state, a copy of its weights and, with `lean="max"`, a few saved activations. So for a
given first block the best set is a knapsack problem. Its weights come from dry runs, and every returned set had one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from peft_bsr.cost.block_contributions import Contributions
from peft_bsr.cost.estimation import Estimate
from peft_bsr.cost.proxy import on_meta, resolve_narrow
from peft_bsr.cost.setup import Setup
from peft_bsr.cost.ways import Allows, ConfigFields, Way, tokens_of, ways_of
from peft_bsr.errors import ConfigError
from peft_bsr.tuners import BSRConfig

_SLACK = 0.03  # of the budget: sets up to this much too large by the sum of bytes get a dry run too
_TRIES = 24
_Blocks = tuple[int, ...]
_Tried = tuple[Way, list[str]]


@dataclass(frozen=True)
class Choice:
    """The best way for one form and one lean level.

    Attributes:
        way: How to train.
        share: Its gain as a fraction of the gain of all blocks on all tokens in the same form.
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
    """The blocks and tokens with the largest gain, for whole weights and for low-rank updates, at each lean level.

    The gain of a block is multiplied by the fraction of tokens that it processes. Leaner levels without a larger gain
    are skipped.

    Args:
        model: Model on the meta device.
        found: Contributions of the blocks.
        setup: How the model is trained.
        dtype: Dtype of the model's weights.
        capacity: Bytes that a plan may take.
        measure: (way, options declined before it) -> its estimate; called a few times for each form and level.

    Raises:
        ConfigError: If the contributions have another number of blocks than the model.
    """
    bare = on_meta(model, setup.image_size)
    spec = resolve_narrow(bare, BSRConfig(keep_rate=1.0)).spec
    allows = Allows.by(bare, spec)
    if found.depth != spec.depth:
        raise ConfigError(
            f"`contributions` are of {found.depth} blocks, but {type(model).__name__} has {spec.depth}. Measure them "
            "on this model."
        )
    tokens = []
    for fields, given_up in tokens_of(spec):
        every: ConfigFields = {"trainable_blocks": "every:1", **fields}
        plan = BSRConfig(**every).plan_for(spec)
        counts = plan.token_counts(spec.num_tokens, spec.num_special)
        tokens.append(_Tokens(fields, given_up, [sum(pair) / 2 / spec.num_tokens for pair in counts]))
    if not any(any(found.of_blocks(form)[: spec.last_read + 1]) for form in ("full", "lora")):
        raise ConfigError(
            "`contributions` has no gain above 0: training no block helped more than the head alone. Measure with "
            "more images (`batches`), or train a linear probe."
        )
    levels = len(_ways(spec.depth, (0,), tokens[0], "full", setup, dtype, allows))
    for form in ("full", "lora"):
        gains, best = found.of_blocks(form)[: spec.last_read + 1], 0.0
        for level in range(levels if sum(gains) else 0):

            def way(blocks: _Blocks, seen: _Tokens, form: str = form, level: int = level) -> _Tried:
                return _ways(spec.depth, blocks, seen, form, setup, dtype, allows)[level]

            choice = _Search(gains, tokens, capacity, way, lambda tried: measure(*tried)).run() if best < 1 else None
            if choice is not None and choice[1] > best:
                best = choice[1]
                yield Choice(choice[0][0], best)


@dataclass(frozen=True)
class _Tokens:
    """Where tokens are dropped, what that gives up, and the fraction of tokens that each block processes."""

    fields: ConfigFields
    given_up: str
    shares: list[float]


@dataclass
class _Search:
    """One form at one lean level."""

    gains: list[float]
    tokens: list[_Tokens]
    capacity: float
    way: Callable[[_Blocks, _Tokens], _Tried]
    measure: Callable[[_Tried], Estimate]

    def run(self) -> tuple[_Tried, float] | None:
        """The best way that fits and its share of the gain of all blocks on all tokens, or None."""
        depth, everything = len(self.gains), self.tokens[0]
        way = self.way(tuple(range(depth)), everything)
        most = self.measure(way)
        if most.total_bytes <= self.capacity:
            return way, 1.0
        first = self.measure(self.way((0,), everything))
        # extra bytes of a trained block over one that gradients only pass through: saved for backward, and the rest
        more = max(0, most.saved_bytes - first.saved_bytes) / max(1, depth - 1)
        fixed = max(0.0, (most.total_bytes - first.total_bytes) / max(1, depth - 1) - more)
        crossed = (first.saved_bytes - more) / depth
        errors: dict[tuple[int, int], float] = {}

        def bytes_before(start: int, shares: list[float]) -> float:
            """Bytes with only the first block trained."""
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
            wrong = took - summed + self.capacity * _SLACK  # so that this set is just too large
            errors[index, blocks[0]] = max(wrong, errors.get((index, blocks[0]), wrong))
        return None


def best_set(values: Sequence[float], weights: Sequence[float], capacity: float) -> _Blocks:
    """Indices of the set with the largest total value whose total weight is at most `capacity` (exact 0/1 knapsack).

    Args:
        values: Value of each item, not negative.
        weights: Weight of each item.
        capacity: Maximum total weight.

    Examples:
        >>> best_set([6, 5, 5], [3, 2, 2], 4)
        (1, 2)
    """
    front: list[tuple[float, float, _Blocks]] = [(0.0, 0.0, ())]  # sets that have more value than every lighter one
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        with_it = [(w + weight, v + value, (*chosen, index)) for w, v, chosen in front]
        merged = sorted([*front, *(one for one in with_it if one[0] <= capacity)], key=lambda one: (one[0], -one[1]))
        front = []
        for one in merged:
            if not front or one[1] > front[-1][1]:
                front.append(one)
    return front[-1][2]


def _ways(
    depth: int, blocks: _Blocks, seen: _Tokens, form: str, setup: Setup, dtype: torch.dtype, allows: Allows
) -> list[_Tried]:
    """A way for each lean level, with the options that were declined before it."""
    is_every = len(blocks) == depth
    named: str | list[int] = "every:1" if is_every else list(blocks)
    fields: ConfigFields = {"trainable_blocks": named, **seen.fields}
    if form == "lora":
        fields["trainable"] = "lora"
    what = "every block" if is_every else f"block {_in_words(blocks)}"
    trained = f"nothing but {'low-rank updates of ' if form == 'lora' else ''}{what} trains"
    declined: list[str] = []
    found: list[_Tried] = []
    setting = (fields, "; ".join(filter(None, (trained, seen.given_up))))
    for way in ways_of(setting, setup, dtype, allows):
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
