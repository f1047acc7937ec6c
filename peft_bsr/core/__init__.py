"""Pure tensor functions and values: no transformers, no peft, no state."""

from peft_bsr.core.attention import (
    CLASS_FREE_SCORE,
    SCORE_KINDS,
    ScoreKind,
    mean_of_visible,
    token_scores,
    weights_to_scores,
)
from peft_bsr.core.autograd import BackwardContext
from peft_bsr.core.budgets import (
    DELTA_REDUCTIONS,
    SELECTIONS,
    block_change,
    reduced_delta,
    select_blocks,
    update_budgets,
)
from peft_bsr.core.context import BLOCKS, BlockCall, Forward, ForwardContext
from peft_bsr.core.experts import Choice, balance_loss, choose_experts, gate_logits, run_experts
from peft_bsr.core.gradient_tokens import TokenSplit
from peft_bsr.core.grouped import Product
from peft_bsr.core.lifetime import outliving
from peft_bsr.core.merging import merge_tokens, sum_tokens
from peft_bsr.core.quantized import as_plain, in_dtype, is_quantized, kept_bytes
from peft_bsr.core.queries import absorb_key, apply_value, attend_plain, hidden_tokens, pooling_weights
from peft_bsr.core.reduction import (
    check_tokens,
    is_traced,
    num_kept,
    pick_tokens,
    put_tokens,
    reduce_tokens,
    select_tokens,
)
from peft_bsr.core.route import NAMED_KINDS, ResumePoint, Route, SideInput, TaskCall

__all__ = [
    "BLOCKS",
    "CLASS_FREE_SCORE",
    "DELTA_REDUCTIONS",
    "NAMED_KINDS",
    "SCORE_KINDS",
    "SELECTIONS",
    "BackwardContext",
    "BlockCall",
    "Choice",
    "Forward",
    "ForwardContext",
    "Product",
    "ResumePoint",
    "Route",
    "ScoreKind",
    "SideInput",
    "TaskCall",
    "TokenSplit",
    "absorb_key",
    "apply_value",
    "as_plain",
    "attend_plain",
    "balance_loss",
    "block_change",
    "check_tokens",
    "choose_experts",
    "gate_logits",
    "hidden_tokens",
    "in_dtype",
    "is_quantized",
    "is_traced",
    "kept_bytes",
    "mean_of_visible",
    "merge_tokens",
    "num_kept",
    "outliving",
    "pick_tokens",
    "pooling_weights",
    "put_tokens",
    "reduce_tokens",
    "reduced_delta",
    "run_experts",
    "select_blocks",
    "select_tokens",
    "sum_tokens",
    "token_scores",
    "update_budgets",
    "weights_to_scores",
]
