"""Adaptive layer budgets (ALaST, arXiv 2408.08670): importance of blocks, their budgets, and which blocks train.

Shapes: B images, D width, L blocks, K of which train in a step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from torch import Tensor

DELTA_REDUCTIONS = ("relative", "paper", "mean")
SELECTIONS = ("prefix", "sample", "topk")


def block_change(before: Tensor, after: Tensor, reduction: str) -> Tensor:
    """How much a block moved the class token: `||after - before||^2`, summed over the images.

    Args:
        before: Class tokens entering the block, [B, D].
        after: Class tokens leaving it, [B, D].
        reduction: `"relative"` divides the value of each image by `||before||^2`; `"paper"` and `"mean"` do not.

    Returns:
        A scalar in float32, for `reduced_delta`.

    Examples:
        >>> import torch
        >>> block_change(torch.ones(2, 4), 3 * torch.ones(2, 4), "relative").item()
        8.0
    """
    before, after = before.detach().float(), after.detach().float()
    change = (after - before).square().sum(dim=1)
    if reduction == "relative":
        change = change / before.square().sum(dim=1).clamp_min(1e-12)
    return change.sum()


def reduced_delta(total: float, images: float, reduction: str) -> float:
    """The importance of a block in a step: the sum over the images, as in the paper, or their mean.

    Args:
        total: Sum of `block_change` over the step's batches, and over all processes.
        images: Number of images in them.
        reduction: See `block_change`.
    """
    return total if reduction == "paper" else total / images


def update_budgets(
    budgets: Sequence[float], new: Sequence[float], old: Sequence[float], alpha: float, low: float, high: float
) -> list[float]:
    """`clip(b + alpha * (new - old), low, high)` for each block.

    Unclipped, the updates telescope: `b_t = b_0 + alpha * (delta_t - delta_0)`, so a budget says how a block's
    importance differs from the first step's, and nothing accumulates.

    Args:
        budgets: Current budgets, [L].
        new: Importance in this step, [L].
        old: Importance in the previous step, [L].
        alpha: Step size.
        low: Smallest budget.
        high: Largest budget.

    Examples:
        >>> update_budgets([0.9, 0.9], [2.0, 1.0], [1.0, 9.0], alpha=0.05, low=0.5, high=1.0)
        [0.9500000000000001, 0.5]
    """
    return [min(max(b + alpha * (n - o), low), high) for b, n, o in zip(budgets, new, old, strict=True)]


def select_blocks(budgets: Sequence[float], count: int, selection: str, generator: random.Random) -> list[int]:
    """Indices of the blocks that train, ascending.

    Args:
        budgets: Current budgets, [L].
        count: Number of blocks, K.
        selection: `"sample"` draws without replacement from softmax(budgets), as in the paper; `"topk"` takes the
            largest, and the later of equal ones; `"prefix"` takes the last K, so that the frozen blocks are the first
            ones and not in the graph.
        generator: Random generator of the draws.
    """
    depth = len(budgets)
    if selection == "sample":
        # the K smallest of exponential variables with rates exp(b) are K draws without replacement from softmax(b)
        times = [(generator.expovariate(math.exp(budget)), index) for index, budget in enumerate(budgets)]
        return sorted(index for _, index in sorted(times)[:count])
    if selection == "topk":
        return sorted(sorted(range(depth), key=lambda index: (budgets[index], index))[depth - count :])
    return list(range(depth - count, depth))
