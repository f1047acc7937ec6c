"""Token reduction as one function with its own backward: few operations, no round trip to the host.

It gives the same numbers as `peft_bsr.core.reduce_tokens`, the definition that compilers and exporters use.
Shapes: B images, N tokens = P prefix + M competing + S suffix, K kept, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft_bsr.compat.torch_api import softmax_backward
from peft_bsr.core import BackwardContext, check_tokens, in_dtype, is_traced
from peft_bsr.core import reduce_tokens as traced_reduce_tokens
from peft_bsr.core import token_scores as any_token_scores
from peft_bsr.ops.half import refuse_second_derivatives, without_autocast

_REFUSED = "fused tokens", '`fuse_dropped=False` and `lean="off"`'


def reduce_tokens(
    hidden_states: Tensor,
    origins: Tensor | None,
    scores: Tensor,
    num_prefix: int,
    keep: int,
    fused_origin: int | None,
    num_suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """`peft_bsr.core.reduce_tokens`; `origins=None` means those of a whole image, 0 to M - 1."""
    num_competing = hidden_states.shape[1] - num_prefix - num_suffix
    if keep == num_competing or is_traced():
        if origins is None:
            origins = torch.arange(num_competing, device=scores.device).expand(scores.shape[0], -1)
        return traced_reduce_tokens(hidden_states, origins, scores, num_prefix, keep, fused_origin, num_suffix)
    check_tokens(hidden_states, origins, scores, num_competing)
    fuses = fused_origin is not None
    tokens, kept = _Reduced.apply(hidden_states, scores, num_prefix, num_competing, keep, fuses)
    left = kept if origins is None else origins.gather(1, kept)
    return tokens, pad(left, (0, 1), value=fused_origin) if fused_origin is not None else left


def token_scores(kind: str, query: Tensor, key: Tensor, scaling: float, attention_mask: Tensor | None = None) -> Tensor:
    """`peft_bsr.core.token_scores`, in few operations for the class token without a mask."""
    if kind == "class" and attention_mask is None and not is_traced():
        scores: Tensor = _ClassScores.apply(query, key, scaling)
        return scores
    return any_token_scores(kind, query, key, scaling, attention_mask)


class _ReducedContext(BackwardContext):
    sizes: tuple[torch.Size, torch.dtype, int, int, int]  # shape, dtype of the scores, P, P + M, K


class _Reduced(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: _ReducedContext,
        hidden: Tensor,
        scores: Tensor,
        num_prefix: int,
        num_competing: int,
        keep: int,
        fuses: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, num_tokens, width = hidden.shape
        end = num_prefix + num_competing
        competing = scores[:, num_prefix:end]
        # stable: ties go to the lower index
        order = torch.sort(competing, dim=1, descending=True, stable=True).indices
        kept = order[:, :keep].sort(dim=1).values
        starts = torch.arange(num_prefix, batch * num_tokens, num_tokens, device=hidden.device)[:, None]
        flat = hidden.reshape(-1, width)
        kept_rows = (kept + starts).view(-1)
        parts = [hidden[:, :num_prefix], flat.index_select(0, kept_rows).view(batch, keep, width)]
        saved: tuple[Tensor, ...] = (kept_rows,)
        if fuses:
            dropped = order[:, keep:].sort(dim=1).values
            dropped_rows = (dropped + starts).view(-1)
            weights = in_dtype(competing.gather(1, dropped), hidden.dtype)[:, None]
            picked = flat.index_select(0, dropped_rows).view(batch, -1, width)
            parts.append(torch.bmm(weights, picked))
            saved = (kept_rows, dropped_rows, weights)
            if ctx.needs_input_grad[1]:
                saved = (*saved, dropped, picked)
        ctx.save_for_backward(*saved)
        ctx.sizes = hidden.shape, scores.dtype, num_prefix, end, keep
        tokens = torch.cat([*parts, hidden[:, end:]], dim=1)
        ctx.mark_non_differentiable(kept)
        return tokens, kept

    @staticmethod
    @without_autocast
    def backward(ctx: _ReducedContext, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        kept_rows, *fused = ctx.saved_tensors
        shape, dtype, num_prefix, end, keep = ctx.sizes
        hidden_grad = gradient.new_empty(shape) if fused else gradient.new_zeros(shape)
        flat, reduced_end = hidden_grad.view(-1, shape[2]), num_prefix + keep
        flat.index_copy_(0, kept_rows, gradient[:, num_prefix:reduced_end].reshape(-1, shape[2]))
        hidden_grad[:, :num_prefix] = gradient[:, :num_prefix]
        if end < shape[1]:
            hidden_grad[:, end:] = gradient[:, end - shape[1] :]
        scores_grad = None
        if fused:
            refuse_second_derivatives(*_REFUSED)  # fusion weights are kept without their graph
            dropped_rows, weights, *asked = fused
            fused_grad = gradient[:, reduced_end : reduced_end + 1]
            flat.index_copy_(0, dropped_rows, (weights.transpose(1, 2) * fused_grad).view(-1, shape[2]))
            if asked:
                dropped, picked = asked
                scores_grad = torch.zeros(shape[:2], dtype=dtype, device=gradient.device)
                weights_grad = torch.bmm(picked, fused_grad.transpose(1, 2))[:, :, 0].to(dtype)
                scores_grad[:, num_prefix:end].scatter_(1, dropped, weights_grad)
        return hidden_grad, scores_grad, None, None, None, None


class _ScoresContext(BackwardContext):
    scaling: float


class _ClassScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ScoresContext, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        # a product and a sum: `@` would copy the key
        logits = (query[:, :, :1] * key).sum(dim=-1) * scaling
        weights = logits.softmax(dim=-1, dtype=torch.float64 if query.dtype is torch.float64 else torch.float32)
        ctx.save_for_backward(query, key, weights)
        ctx.scaling = scaling
        return in_dtype(weights, query.dtype).mean(dim=1)

    @staticmethod
    def backward(ctx: _ScoresContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives(*_REFUSED)
        query, key, weights = ctx.saved_tensors
        shared = (gradient * (ctx.scaling / weights.shape[1]))[:, None].to(weights.dtype).expand_as(weights)
        logits_grad = softmax_backward(shared, weights, -1, weights.dtype).to(query.dtype)[..., None]
        first_grad = (logits_grad * key).sum(dim=2, keepdim=True)
        return pad(first_grad, (0, 0, 0, query.shape[2] - 1)), logits_grad * query[:, :, :1], None


__all__ = ["reduce_tokens", "token_scores"]
