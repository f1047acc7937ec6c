"""Pictures of what a model looks at. Needs matplotlib (`pip install peft-bsr[examples]`)."""

from peft_bsr.viz.attention import draw_attention
from peft_bsr.viz.budgets import draw_budgets
from peft_bsr.viz.kept_tokens import KeptTokens, draw_kept_tokens, kept_tokens

__all__ = ["KeptTokens", "draw_budgets", "draw_kept_tokens", "kept_tokens"]
