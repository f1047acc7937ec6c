"""Describes a LoSA adapter in words."""

from __future__ import annotations

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.tuners.base.description import describe_reductions, name_blocks
from peft_bsr.tuners.losa.config import LoSAConfig


def describe(config: LoSAConfig, spec: ModelSpec, plan: Plan) -> list[str]:
    """What an adapter does to its model, as a list of sentences."""
    axes = "channels and positions" if config.token_mixing else "channels"
    read = config.read_layers(spec)
    return [
        f"All {spec.depth} blocks are frozen; a side network of low-rank mixers across {axes} reads "
        f"{name_blocks(read)} and is added to the tokens that the head gets. It trains with the final norm and the "
        "head.",
        *describe_reductions(spec, plan),
    ]


__all__ = ["describe"]
