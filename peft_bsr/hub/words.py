"""A plan, said in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft_bsr.backbones import Column
from peft_bsr.engine import Plan
from peft_bsr.tuners import ALaSTConfig, SynQTConfig

_RANKED = {
    "class": "by the class token's attention",
    "mean_query": "by the attention of the mean query",
    "received": "by the attention that they receive",
}


def plan_in_words(config: Any, column: Column, plan: Plan) -> list[str]:
    """What an adapter does to its model, one sentence an item. Blocks are counted from 0.

    Args:
        config: The adapter's configuration.
        column: What the model is.
        plan: What is done to it.
    """
    if isinstance(config, SynQTConfig):
        read = config.layers if config.layers is not None else list(range(column.depth))
        sentences = [
            f"All {column.depth} blocks are frozen; {config.num_queries} learned queries a block read "
            f"{_blocks(read)}, and a head of its own classifies."
        ]
    elif isinstance(config, ALaSTConfig):
        count = config.trainable_blocks_per_step
        return [
            f"Budgets decide in every training step which {count or 'three quarters'} of the {column.depth} blocks "
            "train and how many tokens each of them sees; the final norm and the head always train.",
            "When it is used, all blocks run on all tokens: a plain model.",
        ]
    else:
        trained = plan.trained_blocks
        how = "low-rank updates of" if config.trainable == "lora" else "all weights of"
        sentences = [
            f"Of {column.depth} blocks, {how} {_blocks(trained)} train, with the final norm and the head; the others "
            "are frozen."
        ]
        if trained and trained[0] > 0:
            sentences.append(f"No gradient runs further back than block {trained[0]}.")
    return [*sentences, *_reductions(column, plan)]


def _reductions(column: Column, plan: Plan) -> list[str]:
    reduced = [(index, block.reduction) for index, block in enumerate(plan.blocks) if block.reduction is not None]
    if not reduced:
        return ["No tokens are dropped."]
    rates = sorted({reduction.keep_rate for _, reduction in reduced})
    first = reduced[0][1]
    rate = " or ".join(f"{value:.0%}" for value in rates)
    left = _tokens_left(column, plan)
    dropped = "the others are fused into one token" if first.fuse else "the others are dropped"
    sentence = (
        f"At {_blocks([index for index, _ in reduced])}, {rate} of the patches stay, ranked "
        f"{_RANKED.get(first.score, first.score)}; {dropped}: {column.num_tokens} tokens become {_listed(left)}."
    )
    if plan.mode == "full_view":
        sentence += " Dropped tokens keep their place and their last value for the head."
    return [sentence, "The reduction runs in use as in training."]


def _tokens_left(column: Column, plan: Plan) -> list[int]:
    tokens, left = column.num_tokens, []
    for block in plan.blocks:
        if block.reduction is not None:
            tokens = block.reduction.count_after(tokens, column.num_special, column.num_tokens)
            left.append(tokens)
    return left


def _blocks(indices: Sequence[int]) -> str:
    return ("block " if len(indices) == 1 else "blocks ") + _listed(indices)


def _listed(values: Sequence[int]) -> str:
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


__all__ = ["plan_in_words"]
