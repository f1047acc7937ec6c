"""Norm, then query, key and value projections of a block, keeping only the tokens for backward.

Shapes: B images, N tokens, Q of them used as queries, M = B * N rows, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft_bsr.core import BackwardContext, in_dtype
from peft_bsr.ops.half import (
    Compute,
    HalfSettings,
    in_dtypes,
    linears_grads,
    refuse_second_derivatives,
    without_autocast,
)

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ProjectionsOp(HalfSettings):
    """Queries, keys and values of `norm(tokens)`, by three Linears or a fused one (`qkv`).

    Attributes:
        head_width: Width d of a head.
        num_queries: Number Q of first tokens with queries. None: all tokens.
    """

    head_width: int
    num_queries: int | None = None

    def __call__(self, tokens: Tensor, tensors: Sequence[Tensor | None]) -> Heads:
        """[B, N, D] -> queries [B, H, Q, d], keys and values [B, H, N, d].

        Args:
            tokens: The residual stream.
            tensors: See `HalfSettings.bind`.
        """
        heads: Heads = _LeanProjections.apply(tokens, self, Compute.of(tokens), *tensors)
        return heads

    def plain(self, tokens: Tensor, tensors: Sequence[Tensor | None]) -> Heads:
        """The same with plain operations, for autograd or a compiler."""
        compute = Compute.of(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.run(tokens, compute, tensors)

    def run(self, tokens: Tensor, compute: Compute, tensors: Sequence[Tensor | None]) -> Heads:
        """`plain` without autocast."""
        norm, (query, *others) = self.bind(tensors, compute)
        (batch, num_tokens, _), width = tokens.shape, self.head_width
        normalized = in_dtype(norm.run(tokens)[0], compute.dtype)
        flat = normalized.flatten(0, 1)
        if others:
            query_tokens = flat if self.num_queries is None else normalized[:, : self.num_queries].flatten(0, 1)
            products = [query.product(query_tokens), *[linear.product(flat) for linear in others]]
            q, k, v = [product.view(batch, -1, product.shape[1] // width, width) for product in products]
        else:
            q, k, v = query.product(flat).view(batch, num_tokens, 3, -1, width).unbind(2)
            q = q[:, : self.num_queries]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _ProjectionsContext(BackwardContext):
    op: ProjectionsOp
    compute: Compute


class _LeanProjections(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: _ProjectionsContext, tokens: Tensor, op: ProjectionsOp, compute: Compute, *tensors: Tensor | None
    ) -> Heads:
        ctx.op, ctx.compute = op, compute
        ctx.save_for_backward(tokens, *tensors)
        return op.run(tokens, compute, tensors)

    @staticmethod
    @without_autocast
    def backward(ctx: _ProjectionsContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        op, compute = ctx.op, ctx.compute
        tokens, *tensors = ctx.saved_tensors
        needs, num_queries = ctx.needs_input_grad[3:], op.num_queries
        parts = [gradient.transpose(1, 2) for gradient in gradients]  # [B, N, H, d]
        norm, linears = op.bind(tensors, compute)
        normalized, stats = norm.run(tokens)
        normalized = in_dtype(normalized, compute.dtype)
        flat = normalized.flatten(0, 1)
        if len(linears) == 1:
            if num_queries is not None:
                parts[0] = pad(parts[0], (0, 0, 0, 0, 0, tokens.shape[1] - num_queries))
            joined = torch.stack(parts, dim=2).reshape(flat.shape[0], -1)
            tokens_grad, grads = linears_grads(linears, [joined], [flat], needs[2:])
        elif num_queries is None:
            rows = [part.reshape(flat.shape[0], -1) for part in parts]
            tokens_grad, grads = linears_grads(linears, rows, [flat] * 3, needs[2:])
        else:
            query, *others = parts
            query_tokens = normalized[:, :num_queries].flatten(0, 1)
            queries = query.reshape(query_tokens.shape[0], -1)
            query_grad, grads = linears_grads(linears[:1], [queries], [query_tokens], needs[2:6])
            rows = [part.reshape(flat.shape[0], -1) for part in others]
            tokens_grad, other_grads = linears_grads(linears[1:], rows, [flat] * 2, needs[6:])
            tokens_grad.view_as(tokens)[:, :num_queries] += query_grad.view(tokens.shape[0], num_queries, -1)
            grads += other_grads
        norm_grads = norm.grads(tokens_grad.view_as(tokens), tokens, stats, (ctx.needs_input_grad[0], *needs[:2]))
        return norm_grads[0], None, None, *in_dtypes(tensors, (*norm_grads[1:], *grads))


__all__ = ["Heads", "ProjectionsOp"]
