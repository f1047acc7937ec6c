"""Frozen Linear modules with weights in 8 bits or bfloat16.

Autograd on an 8-bit weight would keep the dequantised weight for backward: 27 MiB per block of ViT-B instead of 7. Here
backward dequantises it again, one module at a time. A bfloat16 weight equals autocast's copy; without autocast, it is
cast to the dtype of the inputs, and again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_bsr.core import BackwardContext, as_plain, is_quantized


class FrozenLinear(nn.Linear):
    """A Linear with a quantised or bfloat16 weight: it has input gradients, but no weight gradient."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight, bias = self.weight, self.bias
        fits = weight.dtype == inputs.dtype or torch.is_autocast_enabled(inputs.device.type)
        if fits and not is_quantized(weight):
            return linear(inputs, weight, bias)
        output: Tensor = _FrozenProduct.apply(inputs, weight, bias)
        return output


def freeze_linear(module: nn.Linear) -> None:
    """Make a Linear whose weight was rounded a `FrozenLinear`; names and keys do not change."""
    module.__class__ = FrozenLinear


def exact_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Floating-point parameters that were not rounded: their dtype is the compute dtype of the module."""
    for part in module.modules():
        if not isinstance(part, FrozenLinear):
            yield from (p for p in part.parameters(recurse=False) if p.is_floating_point())


class _FrozenContext(BackwardContext):
    weight: Tensor


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _FrozenContext, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a constant, not an activation: hidden from saved-tensor hooks
        if not is_quantized(weight):
            weight, bias = weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: _FrozenContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return gradient @ as_plain(ctx.weight, gradient.dtype), None, bias


__all__ = ["FrozenLinear", "exact_parameters", "freeze_linear"]
