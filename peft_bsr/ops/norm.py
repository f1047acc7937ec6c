"""LayerNorm, RMSNorm and no norm with their gradients from the recomputed output. Shapes: [..., D] tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peft_bsr.core import in_dtype

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
NormGrads = tuple[Tensor | None, Tensor | None, Tensor | None]  # of tokens, weight, bias


class LayerNormOp(NamedTuple):
    """`nn.LayerNorm` over the last dimension.

    Attributes:
        weight: [D].
        bias: [D], or None.
        eps: LayerNorm epsilon.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float

    def run(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The normalized tokens, and the statistics for `grads`."""
        tokens = _at_least(tokens, self.weight)
        output, *stats = torch.native_layer_norm(tokens, tokens.shape[-1:], self.weight, self.bias, self.eps)
        return output, tuple(stats)

    def grads(self, gradient: Tensor, tokens: Tensor, stats: tuple[Tensor, ...], needs: Sequence[bool]) -> NormGrads:
        """Gradients of tokens, weight and bias, None where one is not needed."""
        wide = _at_least(tokens, self.weight)
        grads = _layer_norm_backward(
            in_dtype(gradient, wide.dtype), wide, wide.shape[-1:], *stats, self.weight, self.bias, list(needs)
        )
        tokens_grad = in_dtype(grads[0], tokens.dtype) if needs[0] else None
        return tokens_grad, grads[1] if needs[1] else None, grads[2] if needs[2] else None


class RMSNormOp(NamedTuple):
    """`weight * x / sqrt(mean(x^2) + eps)`, computed in fp32 and rounded before the product, as transformers does.

    Attributes:
        weight: [D].
        bias: None, for the same signature as `LayerNormOp`.
        eps: Added to the mean square.
    """

    weight: Tensor
    bias: None
    eps: float

    def run(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The normalized tokens, and the inverse root mean square [..., 1] that `grads` needs."""
        tokens = _at_least(tokens, self.weight)
        wide = tokens.float()
        inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * inverse).to(tokens.dtype), (inverse,)

    def grads(self, gradient: Tensor, tokens: Tensor, stats: tuple[Tensor, ...], needs: Sequence[bool]) -> NormGrads:
        """Gradients of tokens, weight and bias, None where one is not needed."""
        (inverse,) = stats
        unit, wide = tokens.float() * inverse, gradient.float()
        weight_grad = (wide * unit).flatten(0, -2).sum(dim=0).to(self.weight.dtype) if needs[1] else None
        if not needs[0]:
            return None, weight_grad, None
        scaled = wide * self.weight.float()
        tokens_grad = inverse * (scaled - unit * (scaled * unit).mean(dim=-1, keepdim=True))
        return tokens_grad.to(tokens.dtype), weight_grad, None


class NoNormOp(NamedTuple):
    """No norm: tokens as they are.

    Attributes:
        weight: None, for the same signature as `LayerNormOp`, as the others.
        bias: None.
        eps: Not used.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def run(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The tokens."""
        return tokens, ()

    def grads(self, gradient: Tensor, tokens: Tensor, stats: tuple[Tensor, ...], needs: Sequence[bool]) -> NormGrads:
        """The gradient of the tokens, None if it is not needed."""
        return in_dtype(gradient, tokens.dtype) if needs[0] else None, None, None


NormOp = LayerNormOp | RMSNormOp | NoNormOp


def norm_kind(module: nn.Module | None) -> tuple[type[NormOp], float] | None:
    """Operator and epsilon of a norm module, or None if it is unknown. The self-test compares it with the module."""
    if module is None or getattr(module, "_fast_norm", False):  # timm's switch to another kernel
        return None
    # one of the same name is timm's, or open_clip's
    if isinstance(module, nn.LayerNorm) and type(module).__name__ == "LayerNorm" and module.weight is not None:
        return LayerNormOp, module.eps
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_rms = type(module).__name__.lower().endswith("rmsnorm")
    is_rms = is_rms and set(dict(module.named_parameters())) == {"weight"}
    if is_rms and isinstance(eps, float):
        return RMSNormOp, eps
    return None


def _at_least(tokens: Tensor, weight: Tensor) -> Tensor:
    """Cast bf16 tokens for an fp32 weight to fp32, as in autocast and in fp32 tuner layers."""
    return tokens if tokens.dtype is weight.dtype else tokens.to(torch.promote_types(tokens.dtype, weight.dtype))


__all__ = ["LayerNormOp", "NoNormOp", "NormOp", "RMSNormOp", "norm_kind"]
