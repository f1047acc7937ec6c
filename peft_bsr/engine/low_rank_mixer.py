"""Low-rank mixing of tokens across channels and across positions, recomputed in backward.

Shapes: B images, N tokens, D width, r and t ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, layer_norm, linear

from peft_bsr.engine.kept_tokens import KeptTokens, keep_tokens, restore_tokens
from peft_bsr.engine.traced import region


class MixerWeights(NamedTuple):
    """The weights of one mixer, all of one dtype. Without mixing across positions, the last four are None.

    Attributes:
        norm_weight, norm_bias: [D].
        channel_down, channel_down_bias: [r, D], [r].
        channel_up, channel_up_bias: [D, r], [D].
        token_down, token_down_bias: [t, N] or per image [B, t, N], [t].
        token_up, token_up_bias: [N, t] or [B, N, t], [N] or [B, N].
    """

    norm_weight: Tensor
    norm_bias: Tensor
    channel_down: Tensor
    channel_down_bias: Tensor
    channel_up: Tensor
    channel_up_bias: Tensor
    token_down: Tensor | None = None
    token_down_bias: Tensor | None = None
    token_up: Tensor | None = None
    token_up_bias: Tensor | None = None

    def detached(self) -> MixerWeights:
        """Without graph: torch's matmul adds up in another order for weights that require gradients."""
        return MixerWeights._make(weight if weight is None else weight.detach() for weight in self)

    def mix(self, tokens: Tensor, eps: float) -> Tensor:
        """`c + t` [B, N, D] of tokens [B, N, D]; see `mix_tokens`."""
        normalized = layer_norm(tokens, tokens.shape[-1:], self.norm_weight, self.norm_bias, eps)
        inside = gelu(linear(normalized, self.channel_down, self.channel_down_bias))
        change = linear(inside, self.channel_up, self.channel_up_bias)
        if self.token_down is None:
            return change
        assert self.token_down_bias is not None and self.token_up is not None and self.token_up_bias is not None
        across = gelu(torch.matmul(self.token_down, normalized + change) + self.token_down_bias[:, None])
        return change + torch.matmul(self.token_up, across) + self.token_up_bias[..., None]


def mix_tokens(tokens: Tensor, weights: MixerWeights, eps: float, kept: KeptTokens = "full") -> Tensor:
    """A channel mixer, then a token mixer on its output; only the tokens are kept for backward.

    ```
    v = LN(u);  c = W_up gelu(W_down v + a) + a';  t = W_up' gelu(W_down' (v + c) + e) + e'
    ```
    Under `torch.compile`, the tokens are kept in full.

    Args:
        tokens: u [B, N, D], any floating dtype.
        weights: Weights of the mixer; their dtype is the compute dtype.
        eps: LayerNorm epsilon.
        kept: How the tokens are kept for backward, in full or rounded. The forward does not round them.

    Returns:
        c + t [B, N, D], in the dtype of the weights.
    """
    dtype = weights.norm_weight.dtype
    with torch.autocast(tokens.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return weights.detached().mix(tokens.to(dtype), eps)
        if torch.compiler.is_compiling():
            (mixed,) = region(lambda tokens: (weights.mix(tokens.to(dtype), eps),), "input", tokens)
            return mixed
        mixed = _Recomputed.apply(tokens, eps, kept, *weights)
        return mixed


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, eps: float, kept: KeptTokens, *weights: Any) -> Tensor:
        ctx.save_for_backward(*weights, *keep_tokens(tokens, kept))
        ctx.eps, ctx.shape, ctx.dtype = eps, tokens.shape, tokens.dtype
        return MixerWeights(*weights).detached().mix(tokens.to(weights[0].dtype), eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        number = len(ctx.needs_input_grad) - 3  # number of weights, some of them None
        weights, packed = ctx.saved_tensors[:number], ctx.saved_tensors[number:]
        tokens = restore_tokens(packed, ctx.shape, ctx.dtype).to(weights[0].dtype)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            inputs: list[Any] = [
                tensor if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip((tokens, *weights), needs, strict=True)
            ]
            mixed = MixerWeights(*inputs[1:]).mix(inputs[0], ctx.eps)
            asked = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
            found = iter(torch.autograd.grad(mixed, asked, gradient))
        of_tokens, *of_weights = [next(found) if needed else None for needed in needs]
        return None if of_tokens is None else of_tokens.to(ctx.dtype), None, None, *of_weights


__all__ = ["MixerWeights", "mix_tokens"]
