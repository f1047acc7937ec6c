"""Tokens of a frozen backbone that are kept for backward, in full or rounded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peft_bsr.ops import PackedTensor, group_size

KeptTokens = Literal["full", "bfloat16", "float16", "int8"]


def keep_tokens(tokens: Tensor, kept: KeptTokens) -> tuple[Tensor, ...]:
    """Pack tokens for `restore_tokens`: one tensor, or codes, smallest numbers and steps."""
    if kept == "full":
        return (tokens,)
    if kept != "int8":
        return (tokens.to(getattr(torch, kept)),)
    dense = tokens.contiguous()
    numbers = PackedTensor.of(dense.view(-1, group_size(dense)))
    return numbers.codes, numbers.smallest, numbers.step


def restore_tokens(packed: tuple[Tensor, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Unpack tokens. Those rounded to 16 bits keep the 16-bit dtype.

    Args:
        packed: From `keep_tokens`.
        shape: Shape of the tokens.
        dtype: Dtype of tokens that were packed as `"int8"`.
    """
    if len(packed) == 1:
        return packed[0]
    return PackedTensor(packed[0], packed[1], packed[2], dtype).unpack().view(shape)


__all__ = ["KeptTokens", "keep_tokens", "restore_tokens"]
