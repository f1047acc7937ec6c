"""Linear modules that never train, their weights in 8 bits or in bfloat16.

Autograd on a weight in 8 bits would keep it for backward as it was before rounding, in full: 27 MiB a block of ViT-B
instead of 7. Here backward makes it anew from the 8 bits, one module at a time. A weight in bfloat16 is what autocast
makes of it at each call; where no autocast runs, it is made anew in the dtype of the inputs in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_bsr.core import as_plain, is_quantized


class FrozenLinear(nn.Linear):
    """A Linear whose weight is a quantised tensor or held in bfloat16: gradients cross it, none reaches the weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight, bias = self.weight, self.bias
        fits = weight.dtype == inputs.dtype or torch.is_autocast_enabled(inputs.device.type)
        if fits and not is_quantized(weight):
            return linear(inputs, weight, bias)
        output: Tensor = _FrozenProduct.apply(inputs, weight, bias)
        return output


def freeze_linear(module: nn.Linear) -> None:
    """Make a Linear, whose weight was rounded, a `FrozenLinear`; its names and keys stay."""
    module.__class__ = FrozenLinear


def exact_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Floating-point parameters that nobody rounded: their dtype is what the module computes in."""
    for part in module.modules():
        if not isinstance(part, FrozenLinear):
            yield from (p for p in part.parameters(recurse=False) if p.is_floating_point())


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a constant: nothing that saves activations in another way has to see it
        if not is_quantized(weight):
            weight, bias = weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype)
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return gradient @ as_plain(ctx.weight, gradient.dtype), None, bias


__all__ = ["FrozenLinear", "exact_parameters", "freeze_linear"]
