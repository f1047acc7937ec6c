"""The common part of the two halves of a pre-norm block: a norm, then Linears of the same normalized tokens.

The norm's output is recomputed from its input in one pass over the tokens, so it is not kept for backward.

Shapes: B images, N tokens, M = B * N rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from peft_bsr.core import in_dtype
from peft_bsr.errors import ForwardError
from peft_bsr.ops.linear import LinearOp
from peft_bsr.ops.norm import NormOp

_NORM, _LINEAR = 2, 4  # number of tensors
_P = ParamSpec("_P")
_Context = TypeVar("_Context")
_Output = TypeVar("_Output")


class Compute(NamedTuple):
    """Compute dtype of Linear modules.

    Attributes:
        dtype: Autocast's dtype, or that of the tokens.
        casts: Whether autocast is on, which casts every weight.
    """

    dtype: torch.dtype
    casts: bool

    @classmethod
    def of(cls, tokens: Tensor) -> Compute:
        """The compute dtype of the current call."""
        device = tokens.device.type
        if torch.is_autocast_enabled(device):
            return cls(torch.get_autocast_dtype(device), True)
        return cls(tokens.dtype, False)


@dataclass(frozen=True)
class HalfSettings:
    """Settings of a half.

    Attributes:
        norm: Operator of the norm.
        eps: Norm epsilon.
        scalings: Factor of each Linear's update, in the order of the Linears.
    """

    norm: type[NormOp]
    eps: float
    scalings: tuple[float, ...]

    def bind(self, tensors: Sequence[Tensor | None], compute: Compute) -> tuple[NormOp, list[LinearOp]]:
        """The norm and the Linears of the half, with Linears cast to the compute dtype.

        Args:
            tensors: Weight and bias of the norm, then weight, bias, lora_A and lora_B of each Linear.
            compute: Compute dtype of the Linears.
        """
        given: Sequence[Any] = tensors  # weights of norm and Linears are not None
        starts = range(_NORM, len(given), _LINEAR)
        linears = [
            LinearOp(given[i], given[i + 1], given[i + 2], given[i + 3], scaling).cast(*compute)
            for i, scaling in zip(starts, self.scalings, strict=True)
        ]
        return self.norm(given[0], given[1], self.eps), linears


def without_autocast(
    function: Callable[Concatenate[_Context, Tensor, _P], _Output],
) -> Callable[Concatenate[_Context, Tensor, _P], _Output]:
    """Decorator that runs an autograd function's forward or backward without autocast."""

    @wraps(function)
    def run(ctx: _Context, tensor: Tensor, *others: _P.args, **named: _P.kwargs) -> _Output:
        device = tensor.device.type
        if not torch.is_autocast_enabled(device):
            return function(ctx, tensor, *others, **named)
        with torch.autocast(device, enabled=False):
            return function(ctx, tensor, *others, **named)

    return run


def linears_grads(
    linears: Sequence[LinearOp],
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of the common input of several Linears, and of their tensors.

    Args:
        linears: Linears in the compute dtype.
        gradients: Gradient of each product, [M, E].
        inputs: Inputs of each Linear, [M, D].
        needs: Whether each tensor of each Linear needs a gradient.

    Returns:
        The input gradient [M, D], summed over all Linears; and the gradients in the order of the tensors.
    """
    total: Any = None
    grads: list[Tensor | None] = []
    for i, (op, gradient, seen) in enumerate(zip(linears, gradients, inputs, strict=True)):
        hidden_grad = op.lora_hidden_grad(gradient)
        grads += op.parameter_grads(gradient, hidden_grad, seen, needs[_LINEAR * i : _LINEAR * (i + 1)])
        total = op.input_grad(gradient, hidden_grad, total)
    return total, grads


def in_dtypes(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients cast to the dtypes of their tensors."""
    return [
        gradient if gradient is None or tensor is None else in_dtype(gradient, tensor.dtype)
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


def refuse_second_derivatives(what: str = "lean blocks", instead: str = '`lean="off"`') -> None:
    """Raise an error if a second derivative is computed.

    Args:
        what: Name of the operation that has none.
        instead: Setting with which to attach the adapter.

    Raises:
        ForwardError: If gradients are enabled in backward.
    """
    if torch.is_grad_enabled():
        raise ForwardError(
            f"{what} have no second derivatives (`create_graph=True` asks for them). Attach the adapter with {instead}."
        )


__all__ = [
    "Compute",
    "HalfSettings",
    "in_dtypes",
    "linears_grads",
    "refuse_second_derivatives",
    "without_autocast",
]
