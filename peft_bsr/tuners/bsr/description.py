"""Describes a BSR adapter in words."""

from __future__ import annotations

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.tuners.base.description import describe_gradient_tokens, describe_reductions, name_blocks
from peft_bsr.tuners.bsr.config import BSRConfig


def describe(config: BSRConfig, spec: ModelSpec, plan: Plan) -> list[str]:
    """What an adapter does to its model, as a list of sentences."""
    trained = plan.trained_blocks
    how = "low-rank updates of" if config.trainable == "lora" else "all weights of"
    head = ", with the final norm and the head" if spec.head else ""
    sentences = [f"Of {spec.depth} blocks, {how} {name_blocks(trained)} train{head}; the others are frozen."]
    if trained and trained[0] > 0:
        sentences.append(f"Blocks before block {trained[0]} get no gradient.")
    return [*sentences, *describe_reductions(spec, plan), *describe_gradient_tokens(plan)]


__all__ = ["describe"]
