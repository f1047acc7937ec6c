"""Linears of a norm's output that keep the norm's input for backward, in any code that calls torch's functions.

An attention may do anything between its projections and its product, but it projects what a LayerNorm has given. The
norm keeps its input anyway; its output is computed again in backward. Shapes: [..., D] tokens, M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.overrides import TorchFunctionMode

from peft_bsr.compat.torch_api import StorageWeakRef, version_of
from peft_bsr.core import BackwardContext, in_dtype
from peft_bsr.ops.half import (
    Compute,
    HalfSettings,
    in_dtypes,
    linears_grads,
    refuse_second_derivatives,
    without_autocast,
)
from peft_bsr.ops.norm import LayerNormOp


@dataclass(frozen=True)
class _Norm:
    """A call of a LayerNorm: its input and tensors, its epsilon, and the version of its output."""

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    eps: float
    version: int


class KeepNormInputs(TorchFunctionMode):
    """Mode in which Linears with one of `weights` keep a LayerNorm's input instead of its output.

    Other operations run as they are. An output that was changed, or copied into another order, is kept.

    Args:
        weights: The weights, as those Linears use them.

    Attributes:
        found: Whether any of them got the output of a LayerNorm that ran inside.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.found = False
        self._weights = set(map(id, weights))
        self._norms: dict[StorageWeakRef, _Norm] = {}  # by the memory of its output, which views share

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what takes its place."""
        if func is linear:
            return self._linear(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if func is layer_norm:
            self._note(output, *args, **(kwargs or {}))
        return output

    def _note(
        self,
        output: Tensor,
        input: Tensor,  # torch's names
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> None:
        if weight is not None and weight.ndim == 1 and output.is_contiguous():
            norm = _Norm(input, weight, bias, eps, version_of(output))
            self._norms[StorageWeakRef(output.untyped_storage())] = norm

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        norm = self._norms.get(StorageWeakRef(input.untyped_storage())) if id(weight) in self._weights else None
        if norm is None or version_of(input) != norm.version or not _is_view(input, norm.tokens):
            return linear(input, weight, bias)
        self.found = True
        if not weight.requires_grad:  # such a Linear keeps no input
            return linear(input, weight, bias)
        settings = HalfSettings(LayerNormOp, norm.eps, (1.0,))
        output: Tensor = _LinearOfNorm.apply(
            input, norm.tokens, settings, Compute.of(norm.tokens), norm.weight, norm.bias, weight, bias
        )
        return output


def _is_view(output: Tensor, tokens: Tensor) -> bool:
    """Whether a tensor with the memory of a norm's output holds all of it, row by row."""
    return output.is_contiguous() and output.numel() == tokens.numel() and output.shape[-1] == tokens.shape[-1]


class _Context(BackwardContext):
    settings: HalfSettings
    compute: Compute
    dtype: torch.dtype
    shape: torch.Size


class _LinearOfNorm(torch.autograd.Function):
    """A Linear whose input is an output of a norm. The gradient of the norm is the norm's own."""

    @staticmethod
    def forward(
        ctx: _Context,
        normalized: Tensor,
        tokens: Tensor,
        settings: HalfSettings,
        compute: Compute,
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.settings, ctx.compute, ctx.dtype, ctx.shape = settings, compute, normalized.dtype, normalized.shape
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, bias)
        return linear(normalized, weight, bias)

    @staticmethod
    @without_autocast
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        tokens, *tensors = ctx.saved_tensors
        norm, linears = ctx.settings.bind([*tensors, None, None], ctx.compute)
        rows = in_dtype(norm.run(tokens)[0], gradient.dtype).flatten(0, -2)
        needs = (*ctx.needs_input_grad[6:], False, False)
        normalized_grad, grads = linears_grads(linears, [gradient.flatten(0, -2)], [rows], needs)
        weight_grad, bias_grad = in_dtypes(tensors[2:], grads[:2])
        normalized_grad = in_dtype(normalized_grad, ctx.dtype).view(ctx.shape)
        return normalized_grad, None, None, None, None, None, weight_grad, bias_grad


__all__ = ["KeepNormInputs"]
