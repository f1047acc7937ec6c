"""Quantized weights: tensor subclasses such as those of torchao."""

from __future__ import annotations

from operator import methodcaller

import torch
from torch import Tensor


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor is a quantized tensor subclass."""
    return type(tensor).dequantize is not Tensor.dequantize


def as_plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, dequantized if necessary, in `dtype`."""
    return tensor.dequantize().to(dtype) if is_quantized(tensor) else tensor.to(dtype)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; the same object, without a call of torch, if it has this dtype already."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def kept_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's storage; for a quantized tensor, of its inner tensors."""
    if not is_quantized(tensor):
        return tensor.untyped_storage().nbytes()
    parts, _ = methodcaller("__tensor_flatten__")(tensor)
    return sum(kept_bytes(getattr(tensor, part)) for part in parts)


__all__ = ["as_plain", "is_quantized", "kept_bytes"]
