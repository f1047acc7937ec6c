"""Describes a SynQT adapter in words."""

from __future__ import annotations

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.tuners.base.description import describe_reductions, name_blocks
from peft_bsr.tuners.synqt.config import SynQTConfig


def describe(config: SynQTConfig, spec: ModelSpec, plan: Plan) -> list[str]:
    """What an adapter does to its model, as a list of sentences."""
    read = config.layers if config.layers is not None else list(range(spec.depth))
    return [
        f"All {spec.depth} blocks are frozen; {config.num_queries} learned queries per block read "
        f"{name_blocks(read)}, and a new head classifies.",
        *describe_reductions(spec, plan),
    ]


__all__ = ["describe"]
