"""ALaST's state, literally, in NumPy: one class token, one block and one image at a time."""

from __future__ import annotations

import numpy as np


def importance(before: np.ndarray, after: np.ndarray, reduction: str) -> float:
    """Of one block; `before` and `after` are class tokens [B, D]."""
    values = []
    for cls_in, cls_out in zip(before, after, strict=True):
        distance = float(np.sum((cls_out - cls_in) ** 2))
        values.append(distance / float(np.sum(cls_in**2)) if reduction == "relative" else distance)
    return sum(values) if reduction == "paper" else sum(values) / len(values)


def new_budget(budget: float, delta_new: float, delta_old: float, alpha: float, low: float, high: float) -> float:
    return float(np.clip(budget + alpha * (delta_new - delta_old), low, high))


def token_counts(budgets: list[float], num_tokens: int, num_prefix: int = 1) -> list[int]:
    """Tokens entering each block."""
    counts = []
    for budget in budgets:
        counts.append(num_tokens)
        num_tokens = min(num_tokens, int(budget * num_tokens) + num_prefix)
    return counts
