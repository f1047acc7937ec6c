"""Pure tensor functions: no transformers, no peft, no state."""

from peft_bsr.core.attention import class_attention
from peft_bsr.core.reduction import num_kept, reduce_tokens, select_tokens

__all__ = ["class_attention", "num_kept", "reduce_tokens", "select_tokens"]
