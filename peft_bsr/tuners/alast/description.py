"""Describes an ALaST adapter in words."""

from __future__ import annotations

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.tuners.alast.config import ALaSTConfig
from peft_bsr.tuners.base.description import describe_gradient_tokens


def describe(config: ALaSTConfig, spec: ModelSpec, plan: Plan) -> list[str]:
    """What an adapter does to its model, as a list of sentences."""
    count = config.trainable_blocks_per_step
    return [
        f"In every training step, budgets decide which {count or 'three quarters'} of the {spec.depth} blocks "
        "train and how many tokens each of them gets; the final norm and the head always train.",
        "In evaluation, all blocks run on all tokens.",
        *describe_gradient_tokens(plan),
    ]


__all__ = ["describe"]
