"""Describes plans in words."""

from __future__ import annotations

from collections.abc import Sequence

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan

_RANKED = {
    "class": "by the class token's attention",
    "mean_query": "by the attention of the mean query",
    "received": "by the attention that they receive",
}


def describe_reductions(spec: ModelSpec, plan: Plan) -> list[str]:
    """Where tokens are dropped or merged, which ones, and how many are left, as a list of sentences.

    Args:
        spec: Description of the model; numbers of tokens are those of its image size, see `ModelSpec.at_size`.
        plan: Plan of the blocks.
    """
    reduced = [(index, block.reduction) for index, block in enumerate(plan.blocks) if block.reduction is not None]
    if not reduced:
        return ["No tokens are dropped."]
    rates = sorted({reduction.keep_rate for _, reduction in reduced})
    first = reduced[0][1]
    rate = " or ".join(f"{value:.0%}" for value in rates)
    left = _tokens_left(spec, plan)
    blocks = name_blocks([index for index, _ in reduced])
    if first.score is None:
        sentence = f"At {blocks}, the most similar patches are averaged until {rate} of the tokens are left"
        in_full_view = " For the head, each patch has the value of its merged token."
    else:
        dropped = "the others are fused into one token" if first.fuse else "the others are dropped"
        sentence = f"At {blocks}, {rate} of the patches stay, ranked {_RANKED[first.score]}; {dropped}"
        in_full_view = " Dropped tokens keep their place and their last value for the head."
    sentence += f": {_size(spec)}{spec.num_tokens} tokens become {_listed(left)}."
    if plan.mode == "full_view":
        sentence += in_full_view
    return [sentence, "The reduction is also active in evaluation."]


def describe_picture(plan: Plan) -> str:
    """What a picture of the kept tokens shows, as one sentence without a full stop."""
    if plan.merges:
        return "Patches after each reduction; merged ones have the mean colour of their token"
    return "Patches that each reduction keeps; dropped ones are shaded"


def describe_gradient_tokens(plan: Plan) -> list[str]:
    """Which tokens carry gradients, as a list of sentences. Empty if all do."""
    wanted = plan.blocks[-1].gradient_tokens
    if wanted is None:
        return []
    how = "at random" if wanted.score is None else _RANKED.get(wanted.score, wanted.score)
    return [
        f"In training, only {wanted.share:.0%} of the patches carry gradients, chosen {how}; all tokens run forward, "
        "and evaluation is unchanged."
    ]


def _size(spec: ModelSpec) -> str:
    """`at 224 x 224 px, `; empty for videos and sound."""
    return "at {1} x {2} px, ".format(*spec.image_shape) if len(spec.image_shape) == 3 else ""


def _tokens_left(spec: ModelSpec, plan: Plan) -> list[int]:
    tokens, left = spec.num_tokens, []
    for block in plan.blocks:
        if block.reduction is not None:
            tokens = block.reduction.count_after(tokens, spec.num_special, spec.num_tokens)
            left.append(tokens)
    return left


def name_blocks(indices: Sequence[int]) -> str:
    """`block 3`, `blocks 3, 7 and 11`, `blocks 0 to 11`."""
    return ("block " if len(indices) == 1 else "blocks ") + _listed(indices)


def _listed(values: Sequence[int]) -> str:
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


__all__ = ["describe_gradient_tokens", "describe_picture", "describe_reductions", "name_blocks"]
