"""Linears of a norm's output that keep the norm's input for backward, in any code that calls torch's functions.

An attention may do anything between its projections and its product, but it projects what a LayerNorm has given. The
norm keeps its input anyway; its output is computed again in backward. Shapes: [..., D] tokens, M rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
    """A call of a LayerNorm: its input and tensors, its epsilon, the dtypes of its output, and the output's version."""

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    eps: float
    dtypes: tuple[torch.dtype, ...]
    version: int


class KeepNormInputs(TorchFunctionMode):
    """Mode in which Linears with one of `weights` keep a LayerNorm's input instead of its output.

    Other operations run as they are. An output that was changed, or copied into another order, is kept; one that was
    copied into another dtype is not.

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
        if func is Tensor.to and output is not args[0] and (norm := self._norm_of(args[0])) is not None:
            norm = replace(norm, dtypes=(*norm.dtypes, output.dtype), version=version_of(output))
            self._norms[StorageWeakRef(output.untyped_storage())] = norm
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
            norm = _Norm(input, weight, bias, eps, (output.dtype,), version_of(output))
            self._norms[StorageWeakRef(output.untyped_storage())] = norm

    def _norm_of(self, output: Tensor) -> _Norm | None:
        norm = self._norms.get(StorageWeakRef(output.untyped_storage()))
        return norm if norm and version_of(output) == norm.version and _is_view(output, norm.tokens) else None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        norm = self._norm_of(input) if id(weight) in self._weights else None
        if norm is None:
            return linear(input, weight, bias)
        self.found = True
        if not weight.requires_grad:  # such a Linear keeps no input
            return linear(input, weight, bias)
        settings = HalfSettings(LayerNormOp, norm.eps, (1.0,))
        output: Tensor = _LinearOfNorm.apply(
            input, norm.tokens, settings, Compute.of(norm.tokens), norm.dtypes, norm.weight, norm.bias, weight, bias
        )
        return output


def _is_view(output: Tensor, tokens: Tensor) -> bool:
    """Whether a tensor with the memory of a norm's output holds all of it, row by row."""
    return output.is_contiguous() and output.numel() == tokens.numel() and output.shape[-1] == tokens.shape[-1]


class _Context(BackwardContext):
    settings: HalfSettings
    compute: Compute
    dtypes: tuple[torch.dtype, ...]
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
        dtypes: tuple[torch.dtype, ...],
        norm_weight: Tensor,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.settings, ctx.compute, ctx.dtypes, ctx.shape = settings, compute, dtypes, normalized.shape
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, bias)
        return linear(normalized, weight, bias)

    @staticmethod
    @without_autocast
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        tokens, *tensors = ctx.saved_tensors
        norm, linears = ctx.settings.bind([*tensors, None, None], ctx.compute)
        normalized = norm.run(tokens)[0]
        for dtype in (*ctx.dtypes, gradient.dtype):  # rounded as in the forward
            normalized = in_dtype(normalized, dtype)
        rows = normalized.flatten(0, -2)
        needs = (*ctx.needs_input_grad[7:], False, False)
        normalized_grad, grads = linears_grads(linears, [gradient.flatten(0, -2)], [rows], needs)
        weight_grad, bias_grad = in_dtypes(tensors[2:], grads[:2])
        normalized_grad = in_dtype(normalized_grad, ctx.dtypes[-1]).view(ctx.shape)
        return normalized_grad, None, None, None, None, None, None, weight_grad, bias_grad


__all__ = ["KeepNormInputs"]
