"""Plan, and the runner that makes a model's blocks follow it along a route."""

from peft_bsr.engine.entry import ReachedError, run_from, run_until
from peft_bsr.engine.frozen import FrozenLinear, exact_parameters, freeze_linear
from peft_bsr.engine.int8 import watch_kept
from peft_bsr.engine.lean_block import plain_mlp
from peft_bsr.engine.parking import Parking
from peft_bsr.engine.plan import BlockPlan, Lean, Mode, Plan, ReduceAt, Reduction
from peft_bsr.engine.query_path import KeptTokens, QueryPath
from peft_bsr.engine.record import find_carrier, record_routes
from peft_bsr.engine.record_scores import BlockScores, record_scores
from peft_bsr.engine.runner import ROUTER, BlockRouter, attach_router, detach_router
from peft_bsr.engine.saved import saved_activations, saved_by_module
from peft_bsr.engine.verify import verify_plan
from peft_bsr.engine.verify_lean import verify_lean
from peft_bsr.engine.verify_mixture import verify_mixture
from peft_bsr.engine.verify_queries import attention_mask, verify_queries

__all__ = [
    "ROUTER",
    "BlockPlan",
    "BlockRouter",
    "BlockScores",
    "FrozenLinear",
    "KeptTokens",
    "Lean",
    "Mode",
    "Parking",
    "Plan",
    "QueryPath",
    "ReachedError",
    "ReduceAt",
    "Reduction",
    "attach_router",
    "attention_mask",
    "detach_router",
    "exact_parameters",
    "find_carrier",
    "freeze_linear",
    "plain_mlp",
    "record_routes",
    "record_scores",
    "run_from",
    "run_until",
    "saved_activations",
    "saved_by_module",
    "verify_lean",
    "verify_mixture",
    "verify_plan",
    "verify_queries",
    "watch_kept",
]
