"""Weights that are kept in fewer bits than they compute in, by tensor subclasses such as torchao's."""

from __future__ import annotations

import torch
from torch import Tensor


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight's numbers are made from fewer bits."""
    return type(tensor).dequantize is not Tensor.dequantize


def as_plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as numbers of that dtype, whatever it is kept as."""
    return tensor.dequantize().to(dtype) if is_quantized(tensor) else tensor.to(dtype)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype; itself, without asking torch, where it has it."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def kept_bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: of its parts, if it is made from fewer bits."""
    if not is_quantized(tensor):
        return tensor.untyped_storage().nbytes()
    parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(kept_bytes(getattr(tensor, part)) for part in parts)


__all__ = ["as_plain", "is_quantized", "kept_bytes"]
