"""What the two halves of a pre-norm block have in common: a norm, then Linears of the same normalized tokens.

Restoring the norm's output from its input, one pass over the tokens, spares keeping it for backward.

Shapes: B images, N tokens, M = B * N rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_bsr.core import in_dtype
from peft_bsr.errors import ForwardError
from peft_bsr.ops.linear import LinearOp
from peft_bsr.ops.norm import NormOp

_NORM, _LINEAR = 2, 4  # tensors of each


class Compute(NamedTuple):
    """What Linear modules compute in.

    Attributes:
        dtype: Autocast's, or that of the tokens.
        casts: Whether autocast is on, which casts every weight.
    """

    dtype: torch.dtype
    casts: bool

    @classmethod
    def of(cls, tokens: Tensor) -> Compute:
        """That of the present call."""
        device = tokens.device.type
        if torch.is_autocast_enabled(device):
            return cls(torch.get_autocast_dtype(device), True)
        return cls(tokens.dtype, False)


@dataclass(frozen=True)
class HalfSettings:
    """What does not depend on a half's tensors.

    Attributes:
        norm: Operator of the norm.
        eps: Norm epsilon.
        scalings: Factor of each Linear's update, in the order of the Linears.
    """

    norm: type[NormOp]
    eps: float
    scalings: tuple[float, ...]

    def bind(self, tensors: Sequence[Any], compute: Compute) -> tuple[Any, list[LinearOp]]:
        """Norm and Linears of the half, these cast to compute.

        Args:
            tensors: Weight and bias of the norm, then weight, bias, lora_A and lora_B of each Linear.
            compute: What Linears compute in.
        """
        starts = range(_NORM, len(tensors), _LINEAR)
        linears = [
            LinearOp(*tensors[i : i + _LINEAR], scaling).cast(*compute)  # type: ignore[call-arg]
            for i, scaling in zip(starts, self.scalings, strict=True)
        ]
        return self.norm(tensors[0], tensors[1], self.eps), linears


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of an autograd function's forward or backward, which chooses its dtypes itself."""

    @wraps(function)
    def run(ctx: Any, tensor: Tensor, *others: Any) -> Any:
        device = tensor.device.type
        if not torch.is_autocast_enabled(device):
            return function(ctx, tensor, *others)
        with torch.autocast(device, enabled=False):
            return function(ctx, tensor, *others)

    return run


def linears_grads(
    linears: Sequence[LinearOp],
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradient of what several Linears share as input, and those of their tensors.

    Args:
        linears: In the dtype that is computed in.
        gradients: Of each product, [M, E].
        inputs: Of each, [M, D].
        needs: One bool for each tensor of each Linear.

    Returns:
        [M, D], summed over all Linears; and the gradients in the order of the tensors.
    """
    total: Any = None
    found: list[Tensor | None] = []
    for i, (op, gradient, seen) in enumerate(zip(linears, gradients, inputs, strict=True)):
        hidden_grad = op.lora_hidden_grad(gradient)
        found += op.parameter_grads(gradient, hidden_grad, seen, needs[_LINEAR * i : _LINEAR * (i + 1)])
        total = op.input_grad(gradient, hidden_grad, total)
    return total, found


def in_dtypes(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the dtypes of what they are of."""
    return [
        gradient if gradient is None or tensor is None else in_dtype(gradient, tensor.dtype)
        for tensor, gradient in zip(tensors, gradients, strict=True)
    ]


def refuse_second_derivatives(what: str = "lean blocks", instead: str = '`lean="off"`') -> None:
    """Raise where a gradient of a gradient is asked for.

    Args:
        what: Has none.
        instead: With what to attach the adapter.

    Raises:
        ForwardError: If so.
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
