"""Merging of tokens with a backward of its own: few operations. Shapes: see `peft_bsr.core.merge_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_bsr.core import BackwardContext, is_traced, sum_tokens
from peft_bsr.core import merge_tokens as plain_merge_tokens
from peft_bsr.ops.half import without_autocast


def merge_tokens(
    hidden_states: Tensor, origins: Tensor, merged: Tensor, num_prefix: int, keep: int, num_suffix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`peft_bsr.core.merge_tokens`."""
    sums = sum_tokens if is_traced() else _Summed.apply
    return plain_merge_tokens(hidden_states, origins, merged, num_prefix, keep, num_suffix, sums)


class _Summed(torch.autograd.Function):
    """`peft_bsr.core.sum_tokens`."""

    @staticmethod
    @without_autocast
    def forward(ctx: BackwardContext, tokens: Tensor, place: Tensor, weights: Tensor, left: int) -> Tensor:
        images, _, width = tokens.shape
        rows = (place + left * torch.arange(images, device=place.device)[:, None]).reshape(-1)
        weighted = (tokens * weights[..., None]).reshape(-1, width)
        ctx.save_for_backward(rows, weights)
        return weighted.new_zeros(images * left, width).index_add_(0, rows, weighted).view(images, left, width)

    @staticmethod
    @without_autocast
    def backward(ctx: BackwardContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        of_tokens = gradient.reshape(-1, gradient.shape[2]).index_select(0, rows).view(*weights.shape, -1)
        return of_tokens.mul_(weights[..., None]), None, None, None


__all__ = ["merge_tokens"]
