"""Pictures of what a model looks at, and of what it keeps. Needs matplotlib (`pip install peft-bsr[examples]`)."""

from peft_bsr.viz.attention import draw_attention
from peft_bsr.viz.budgets import draw_budgets
from peft_bsr.viz.confusion import MOST_CLASSES, draw_confusion
from peft_bsr.viz.contributions import draw_contributions
from peft_bsr.viz.kept_tokens import KeptTokens, draw_kept, draw_kept_tokens, kept_token_pictures
from peft_bsr.viz.memory import draw_saved_memory, saved_by_block

__all__ = [
    "MOST_CLASSES",
    "KeptTokens",
    "draw_attention",
    "draw_budgets",
    "draw_confusion",
    "draw_contributions",
    "draw_kept",
    "draw_kept_tokens",
    "draw_saved_memory",
    "kept_token_pictures",
    "saved_by_block",
]
