"""Activation functions with their derivatives, by torch's kernels, and the combination of an MLP's first products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

_gelu_backward = torch.ops.aten.gelu_backward.default
_silu_backward = torch.ops.aten.silu_backward.default


@dataclass(frozen=True)
class Activation:
    """An element-wise function with its derivative; it also maps an MLP's first product to its hidden states.

    Attributes:
        forward: Tensor -> tensor.
        backward: (gradient of the output, input) -> gradient of the input.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> Activation | None:
        """The activation of a torch or transformers module, or None if it is unknown."""
        name = type(module).__name__
        by_tanh = ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation")
        if name in ("GELU", "GELUActivation", *by_tanh):
            tanh = name in by_tanh or getattr(module, "approximate", "none") == "tanh"
            return cls(module.forward, partial(_gelu_backward, approximate="tanh" if tanh else "none"))
        if name in ("SiLU", "SiLUActivation"):
            return cls(module.forward, _silu_backward)
        if name in ("QuickGELUActivation", "QuickGELU"):  # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702
            return cls(module.forward, _quick_gelu_backward)
        if name == "ReLU":
            return cls(module.forward, _relu_backward)
        return None

    def combine(self, products: Sequence[Tensor]) -> Tensor:
        """Hidden states [M, F] of the one product [M, F]."""
        return self.forward(products[0])

    def combine_grads(self, gradient: Tensor, products: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of the product from that of the hidden states."""
        return [self.backward(gradient, products[0])]


@dataclass(frozen=True)
class Gate(Activation):
    """`activation(gate) * up` of two products [M, F], or of one [M, 2 F] whose first half is the gate (SwiGLU)."""

    def combine(self, products: Sequence[Tensor]) -> Tensor:
        """Hidden states [M, F]."""
        gate, up = _both(products)
        return self.forward(gate) * up

    def combine_grads(self, gradient: Tensor, products: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the products from that of the hidden states."""
        gate, up = _both(products)
        grads = [self.backward(gradient * up, gate), gradient * self.forward(gate)]
        return grads if len(products) == 2 else [torch.cat(grads, dim=-1)]


def _both(products: Sequence[Tensor]) -> Sequence[Tensor]:
    return products if len(products) == 2 else products[0].chunk(2, dim=-1)


def _quick_gelu_backward(gradient: Tensor, inputs: Tensor) -> Tensor:
    return _silu_backward(gradient, 1.702 * inputs)


def _relu_backward(gradient: Tensor, inputs: Tensor) -> Tensor:
    return gradient * (inputs > 0)


__all__ = ["Activation", "Gate"]
