"""The plan of a model's blocks, and the code that runs the blocks by it."""

from peft_bsr.engine.compiled import Compiler
from peft_bsr.engine.controller import CONTROLLER, BlockController
from peft_bsr.engine.explain import describe_block, explain_blocks
from peft_bsr.engine.int8 import watch_kept
from peft_bsr.engine.kept_tokens import KeptTokens
from peft_bsr.engine.living import LivingBytes
from peft_bsr.engine.low_rank_mixer import MixerWeights, mix_tokens
from peft_bsr.engine.parts import plain_mlp
from peft_bsr.engine.plan import BlockPlan, GradientTokens, Lean, Mode, Plan, ReduceAt, Reduction
from peft_bsr.engine.query_path import ROLES, QueryPath, attention_mask, projections
from peft_bsr.engine.record import find_forward, record_routes
from peft_bsr.engine.record_scores import BlockScores, record_scores
from peft_bsr.engine.resume import StopForwardError, run_from, run_until
from peft_bsr.engine.runner import attach_controller, detach_controller
from peft_bsr.engine.saved import saved_activations, saved_by_module
from peft_bsr.engine.traced import warn_of_budget
from peft_bsr.engine.weight_offload import WeightOffload

__all__ = [
    "CONTROLLER",
    "ROLES",
    "BlockController",
    "BlockPlan",
    "BlockScores",
    "Compiler",
    "GradientTokens",
    "KeptTokens",
    "Lean",
    "LivingBytes",
    "MixerWeights",
    "Mode",
    "Plan",
    "QueryPath",
    "ReduceAt",
    "Reduction",
    "StopForwardError",
    "WeightOffload",
    "attach_controller",
    "attention_mask",
    "describe_block",
    "detach_controller",
    "explain_blocks",
    "find_forward",
    "mix_tokens",
    "plain_mlp",
    "projections",
    "record_routes",
    "record_scores",
    "run_from",
    "run_until",
    "saved_activations",
    "saved_by_module",
    "warn_of_budget",
    "watch_kept",
]
