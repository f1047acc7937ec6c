"""Halves of a pre-norm block that keep for backward only what cannot be had cheaply again.

Stock, a trained block keeps 16 token tensors for backward: inputs of the two norms and of the linears, queries, keys,
values, the MLP's 4-fold wide hidden states before and after the activation. Here the input of a norm stands for its
output (one pass over the tokens restores it) and the hidden states before the activation for those behind it: 10, with
no matrix product computed twice. With `save_products=False` the products are computed again as well: 3.

Gradients are those of the stock path, in the same order of operations; second derivatives are refused.

Shapes: B images, N tokens, Q of them asked for queries, D width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_bsr.core import as_plain
from peft_bsr.errors import ForwardError

_gelu_backward = torch.ops.aten.gelu_backward
_layer_norm = torch.ops.aten.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


@dataclass(frozen=True)
class Affine:
    """Weight and bias of a LayerNorm or Linear module, whichever tensors are in force."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, module: Any) -> Affine:
        """Those of `module`."""
        return cls(module.weight, module.bias)


@dataclass(frozen=True)
class Activation:
    """An element-wise function with its derivative, by torch's own kernels.

    Attributes:
        forward: Tensor -> tensor.
        backward: (gradient of the output, input) -> gradient of the input.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, module: Any) -> Activation | None:
        """That of a module of torch or transformers, or None if it is not known."""
        name = type(module).__name__
        by_tanh = ("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation")
        if name in ("GELU", "GELUActivation", *by_tanh):
            tanh = name in by_tanh or getattr(module, "approximate", "none") == "tanh"
            return cls(module, partial(_gelu_backward, approximate="tanh" if tanh else "none"))
        if name in ("SiLU", "SiLUActivation"):
            return cls(module, torch.ops.aten.silu_backward)
        if name == "QuickGELUActivation":  # x * sigmoid(1.702 x) = silu(1.702 x) / 1.702
            return cls(module, lambda gradient, x: torch.ops.aten.silu_backward(gradient, 1.702 * x))
        if name == "ReLU":
            return cls(module, lambda gradient, x: gradient * (x > 0))
        return None


def lean_mlp(
    tokens: Tensor,
    norm: Affine,
    eps: float,
    first: Affine,
    activation: Activation,
    second: Affine,
    save_products: bool = True,
) -> Tensor:
    """`second(activation(first(norm(tokens))))`, keeping the tokens [B, N, D] and, if asked, the product [B, N, F].

    Args:
        tokens: [B, N, D], the residual stream.
        norm: Of the LayerNorm.
        eps: Of the LayerNorm.
        first: Of the Linear D -> F.
        activation: See `Activation.of`.
        second: Of the Linear F -> D.
        save_products: Keep `first`'s output instead of computing it again.

    Returns:
        [B, N, D], without the residual.
    """
    parameters = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
    output: Tensor = _LeanMLP.apply(tokens, eps, activation, save_products, _compute_dtype(tokens), *parameters)
    return output


def lean_projections(
    tokens: Tensor, norm: Affine, eps: float, query: Affine, key: Affine, value: Affine, num_queries: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `norm(tokens)`, keeping the tokens alone.

    Args:
        tokens: [B, N, D], the residual stream.
        norm: Of the LayerNorm.
        eps: Of the LayerNorm.
        query: Of the Linear.
        key: Of the Linear.
        value: Of the Linear.
        num_queries: Q, ask the first Q tokens only; default all.

    Returns:
        [B, Q, D], [B, N, D], [B, N, D].
    """
    parameters = (norm.weight, norm.bias, query.weight, query.bias, key.weight, key.bias, value.weight, value.bias)
    outputs: tuple[Tensor, Tensor, Tensor] = _LeanProjections.apply(
        tokens, eps, num_queries, _compute_dtype(tokens), *parameters
    )
    return outputs


def recomputed(
    run: Callable[..., tuple[Tensor, ...]], tokens: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, ...]:
    """`run(tokens, *parameters)`, keeping the tokens alone; backward runs it once more.

    Args:
        run: A pure function of its arguments, without dropout.
        tokens: [B, N, D].
        parameters: What else gets gradients.

    Returns:
        What `run` returns.
    """
    device = tokens.device.type
    autocast = (device, torch.is_autocast_enabled(device), _compute_dtype(tokens))
    outputs: tuple[Tensor, ...] = _Recomputed.apply(run, autocast, tokens, *parameters)
    return outputs


class _LeanMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        eps: float,
        activation: Activation,
        save_products: bool,
        dtype: torch.dtype,
        *parameters: Tensor | None,
    ) -> Tensor:
        norm_weight, norm_bias, first_weight, first_bias, second_weight, second_bias = parameters
        with _autocast_off(tokens):
            normalized = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)[0]
            product = linear(normalized.to(dtype), *_cast(dtype, first_weight, first_bias))
            output = linear(activation.forward(product), *_cast(dtype, second_weight, second_bias))
        kept = product if save_products else None
        ctx.save_for_backward(tokens, kept, norm_weight, norm_bias, first_weight, first_bias, second_weight)
        ctx.eps, ctx.activation, ctx.dtype = eps, activation, dtype
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        tokens, product, norm_weight, norm_bias, first_weight, first_bias, second_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[5:]
        with _autocast_off(tokens):
            weight, bias = _cast(ctx.dtype, first_weight, first_bias)
            normalized, mean, rstd = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, ctx.eps)
            normalized = normalized.to(ctx.dtype)
            if product is None:
                product = linear(normalized, weight, bias)
            hidden = ctx.activation.forward(product) if needs[4] else None
            second = _weight_gradients(gradient, hidden, second_weight.dtype, needs[4], needs[5])
            del hidden  # one wide tensor less at the peak
            product_gradient = ctx.activation.backward(gradient @ as_plain(second_weight, ctx.dtype), product)
            del product
            first = _weight_gradients(product_gradient, normalized, first_weight.dtype, needs[2], needs[3])
            gradient_in = product_gradient @ weight
            into = _norm_gradients(ctx, gradient_in, tokens, mean, rstd, norm_weight, norm_bias, needs)
        return into[0], None, None, None, None, *into[1:], *first, *second


class _LeanProjections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, eps: float, num_queries: int | None, dtype: torch.dtype, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        norm_weight, norm_bias, *projections = parameters
        with _autocast_off(tokens):
            normalized = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)[0].to(dtype)
            weights = [_cast(dtype, *projections[i : i + 2]) for i in (0, 2, 4)]
            outputs = tuple(
                linear(normalized[:, :num_queries] if i == 0 else normalized, *pair) for i, pair in enumerate(weights)
            )
        ctx.save_for_backward(tokens, norm_weight, norm_bias, *projections[::2])
        ctx.eps, ctx.num_queries, ctx.dtype = eps, num_queries, dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        tokens, norm_weight, norm_bias, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        with _autocast_off(tokens):
            normalized, mean, rstd = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, ctx.eps)
            normalized = normalized.to(ctx.dtype)
            found: list[Tensor | None] = []
            for i, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
                inputs = normalized[:, : ctx.num_queries] if i == 0 else normalized
                found += _weight_gradients(gradient, inputs, weight.dtype, needs[2 + 2 * i], needs[3 + 2 * i])
            query, key, value = (g.flatten(0, 1) for g in gradients)
            to_query, to_key, to_value = _cast(ctx.dtype, *weights)
            flat = torch.addmm(key @ to_key, value, to_value)  # adding while multiplying spares a pass over the tokens
            if ctx.num_queries is None:
                gradient_in = torch.addmm(flat, query, to_query).view_as(tokens)
            else:
                gradient_in = flat.view_as(tokens)
                gradient_in[:, : ctx.num_queries] += (query @ to_query).view_as(gradient_in[:, : ctx.num_queries])
            into = _norm_gradients(ctx, gradient_in, tokens, mean, rstd, norm_weight, norm_bias, needs)
        return into[0], None, None, None, *into[1:], *found


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., tuple[Tensor, ...]], autocast: Any, tokens: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tokens, *parameters)
        ctx.run, ctx.autocast = run, autocast
        return run(tokens, *parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        device, is_enabled, dtype = ctx.autocast
        inputs: list[Any] = [None if t is None else t.detach() for t in ctx.saved_tensors]
        wanted = [t for t, need in zip(inputs, ctx.needs_input_grad[2:], strict=True) if need]
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=is_enabled):
            for tensor in wanted:
                tensor.requires_grad_()
            outputs = ctx.run(*inputs)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        rest = iter(found)
        return None, None, *(next(rest) if need else None for need in ctx.needs_input_grad[2:])


def _weight_gradients(
    gradient: Tensor, inputs: Tensor | None, dtype: torch.dtype, needs_weight: bool, needs_bias: bool
) -> list[Tensor | None]:
    """Of a Linear, from the gradient of its output [B, N, E] and its inputs [B, N, D]."""
    flat = gradient.flatten(0, 1)
    weight = flat.T @ inputs.flatten(0, 1) if needs_weight and inputs is not None else None
    bias = flat.sum(dim=0) if needs_bias else None
    return [None if tensor is None else tensor.to(dtype) for tensor in (weight, bias)]


def _norm_gradients(
    ctx: Any, gradient: Tensor, tokens: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, needs: Any
) -> tuple[Tensor | None, ...]:
    """Of a LayerNorm: tokens, weight, bias."""
    mask = [ctx.needs_input_grad[0], needs[0], needs[1]]
    if not any(mask):
        return None, None, None
    gradient = gradient.to(tokens.dtype)
    found = _layer_norm_backward(gradient, tokens, tokens.shape[-1:], mean, rstd, weight, bias, mask)
    return tuple(tensor if need else None for tensor, need in zip(found, mask, strict=True))


def _compute_dtype(tokens: Tensor) -> torch.dtype:
    """What Linear modules compute in: autocast's dtype, or that of the tokens."""
    device = tokens.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else as_plain(tensor, dtype) for tensor in tensors]


def _autocast_off(tokens: Tensor) -> Any:
    return torch.autocast(tokens.device.type, enabled=False)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise ForwardError(
            "lean blocks have no second derivatives (`create_graph=True` asks for them). Attach the adapter with "
            '`lean="off"`.'
        )


__all__ = ["Activation", "Affine", "lean_mlp", "lean_projections", "recomputed"]
