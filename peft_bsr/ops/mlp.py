"""Norm and MLP of a block, keeping only the tokens, or the tokens and the first products, for backward.

A stock half keeps the norm's input and output, the products and the hidden states. Shapes: B images, N tokens, M = B *
N rows, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_bsr.core import BackwardContext, in_dtype
from peft_bsr.ops.activation import Activation
from peft_bsr.ops.dropout import draw_mask, generator_at, generator_state
from peft_bsr.ops.half import (
    Compute,
    HalfSettings,
    in_dtypes,
    linears_grads,
    refuse_second_derivatives,
    without_autocast,
)


@dataclass(frozen=True)
class MLPOp(HalfSettings):
    """`last(activation(first(norm(tokens))))`, or a gated MLP with one or two Linears as `first`.

    Attributes:
        activation: Function from the first products to the hidden states [M, F], an `Activation` or a `Gate`.
    """

    activation: Activation

    def __call__(
        self, tokens: Tensor, tensors: Sequence[Tensor | None], save_products: bool = True, rate: float = 0.0
    ) -> Tensor:
        """Output of the MLP without the residual.

        Args:
            tokens: [B, N, D], the residual stream.
            tensors: See `HalfSettings.bind`; the last Linear is F -> D.
            save_products: Whether to keep the products of the first Linears instead of recomputing them in backward.
            rate: Dropout rate of the hidden states; the mask is drawn again in backward.

        Returns:
            [B, N, D].
        """
        output: Tensor = _LeanMLP.apply(tokens, self, Compute.of(tokens), save_products, rate, *tensors)
        return output


class _MLPContext(BackwardContext):
    op: MLPOp
    compute: Compute
    rate: float
    state: Tensor | None
    num_products: int


class _LeanMLP(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: _MLPContext,
        tokens: Tensor,
        op: MLPOp,
        compute: Compute,
        save_products: bool,
        rate: float,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.op, ctx.compute, ctx.rate = op, compute, rate
        ctx.state = generator_state(tokens.device) if rate else None
        norm, (*first, last) = op.bind(tensors, compute)
        normalized = in_dtype(norm.run(tokens)[0], compute.dtype).flatten(0, 1)
        products = [linear.product(normalized) for linear in first]
        hidden = op.activation.combine(products)
        if rate:
            hidden = hidden * draw_mask(hidden, rate)
        output = last.product(hidden)
        ctx.num_products = len(products) if save_products else 0
        ctx.save_for_backward(tokens, *products[: ctx.num_products], *tensors)
        return output.view(*tokens.shape[:2], -1)

    @staticmethod
    @without_autocast
    def backward(ctx: _MLPContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        op, compute = ctx.op, ctx.compute
        tokens, *saved = ctx.saved_tensors
        products, tensors = saved[: ctx.num_products], saved[ctx.num_products :]
        needs = ctx.needs_input_grad[5:]
        norm, (*first, last) = op.bind(tensors, compute)
        normalized, stats = norm.run(tokens)
        normalized = in_dtype(normalized, compute.dtype).flatten(0, 1)
        products = products or [linear.product(normalized) for linear in first]
        gradient = gradient.flatten(0, 1)
        needs_hidden = needs[-4] or needs[-2] or needs[-1]
        mask = None
        if ctx.rate:
            with generator_at(ctx.state, tokens.device):
                mask = draw_mask(products[0][:, : last.weight.shape[1]], ctx.rate)
        hidden = op.activation.combine(products) if needs_hidden else None
        if mask is not None and hidden is not None:
            hidden = hidden * mask
        hidden_grad = last.lora_hidden_grad(gradient)
        last_grads = last.parameter_grads(gradient, hidden_grad, hidden, needs[-4:])
        del hidden  # one wide tensor less at the peak
        gradient = last.input_grad(gradient, hidden_grad)
        gradient = gradient if mask is None else gradient * mask
        gradients = op.activation.combine_grads(gradient, products)
        del products, saved, gradient
        tokens_grad, grads = linears_grads(first, gradients, [normalized] * len(first), needs[2:-4])
        norm_grads = norm.grads(tokens_grad.view_as(tokens), tokens, stats, (ctx.needs_input_grad[0], *needs[:2]))
        parameter_grads = in_dtypes(tensors, (*norm_grads[1:], *grads, *last_grads))
        return norm_grads[0], None, None, None, None, *parameter_grads


__all__ = ["MLPOp"]
