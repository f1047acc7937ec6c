"""Operators with their own backward: functions of tensors, without modules."""

from peft_bsr.ops.activation import Activation, Gate
from peft_bsr.ops.dropout import lean_dropout
from peft_bsr.ops.frozen import FrozenLinear, exact_parameters, freeze_linear
from peft_bsr.ops.int8 import PackedTensor, group_size
from peft_bsr.ops.linear import LinearOp
from peft_bsr.ops.merge import merge_tokens
from peft_bsr.ops.mlp import MLPOp
from peft_bsr.ops.norm import LayerNormOp, NoNormOp, NormOp, RMSNormOp, norm_kind
from peft_bsr.ops.norm_inputs import KeepNormInputs
from peft_bsr.ops.projections import Heads, ProjectionsOp
from peft_bsr.ops.recompute import recomputed
from peft_bsr.ops.reduce import reduce_tokens, token_scores

__all__ = [
    "Activation",
    "FrozenLinear",
    "Gate",
    "Heads",
    "KeepNormInputs",
    "LayerNormOp",
    "LinearOp",
    "MLPOp",
    "NoNormOp",
    "NormOp",
    "PackedTensor",
    "ProjectionsOp",
    "RMSNormOp",
    "exact_parameters",
    "freeze_linear",
    "group_size",
    "lean_dropout",
    "merge_tokens",
    "norm_kind",
    "recomputed",
    "reduce_tokens",
    "token_scores",
]
