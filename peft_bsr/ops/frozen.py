"""Linear modules that never train, their weights in 8 bits.

Autograd on such a weight would keep it for backward as it was before rounding, in full: 27 MiB a block of ViT-B instead
of 7. Here backward makes it anew from the 8 bits, one module at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peft_bsr.core import as_plain


class FrozenLinear(nn.Linear):
    """A Linear whose weight is a quantised tensor: gradients cross it, none reaches the weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output: Tensor = _FrozenProduct.apply(inputs, self.weight, self.bias)
        return output


def freeze_linear(module: nn.Linear) -> None:
    """Make a Linear, whose weight was quantised, a `FrozenLinear`; its names and keys stay."""
    module.__class__ = FrozenLinear


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a constant: nothing that saves activations in another way has to see it
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return gradient @ as_plain(ctx.weight, gradient.dtype), None, bias


__all__ = ["FrozenLinear", "freeze_linear"]
