"""Checks on the model itself, when an adapter is attached, that a plan computes what it should."""

from peft_bsr.selftest.experts import verify_mixture
from peft_bsr.selftest.gradient_tokens import verify_gradient_tokens
from peft_bsr.selftest.lean import verify_lean
from peft_bsr.selftest.queries import verify_queries
from peft_bsr.selftest.reduction import controlled, verify_plan
from peft_bsr.selftest.stages import verify_stages

__all__ = [
    "controlled",
    "verify_gradient_tokens",
    "verify_lean",
    "verify_mixture",
    "verify_plan",
    "verify_queries",
    "verify_stages",
]
