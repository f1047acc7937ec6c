"""Halves of a pre-norm block that keep for backward only what cannot be had cheaply again.

Stock, a trained block keeps 16 token tensors for backward: inputs of the two norms and of the linears, queries, keys,
values, the MLP's 4-fold wide hidden states before and after the activation. Here the input of a norm stands for its
output (one pass over the tokens restores it) and the hidden states before the activation for those behind it: 10, with
no matrix product computed twice. With `save_products=False` the products are computed again as well: 3.

A Linear may have a low-rank update beside it: what that needs for backward is made of the same tensors.

Gradients are those of the stock path, in the same order of operations; second derivatives are refused.

Shapes: B images, N tokens, Q of them asked for queries, D width, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_bsr.engine.affine import Affine, affines_of
from peft_bsr.errors import ForwardError

_gelu_backward = torch.ops.aten.gelu_backward
_layer_norm = torch.ops.aten.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


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
    how = (eps, activation, save_products, _compute_dtype(tokens), (first.scaling, second.scaling))
    output: Tensor = _LeanMLP.apply(tokens, how, norm.weight, norm.bias, *first.tensors, *second.tensors)
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
    projections = (query, key, value)
    how = (eps, num_queries, _compute_dtype(tokens), tuple(p.scaling for p in projections))
    parameters = [tensor for p in projections for tensor in p.tensors]
    outputs: tuple[Tensor, Tensor, Tensor] = _LeanProjections.apply(tokens, how, norm.weight, norm.bias, *parameters)
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
    def forward(ctx: Any, tokens: Tensor, how: Any, *parameters: Tensor | None) -> Tensor:
        ctx.how = eps, activation, save_products, dtype, scalings = how
        norm_weight, norm_bias, *others = parameters
        first, second = affines_of(others, scalings)
        with _autocast_off(tokens):
            normalized = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)[0]
            product = first.cast(dtype).product(normalized.to(dtype))
            output = second.cast(dtype).product(activation.forward(product))
        others[5] = None  # the second bias
        ctx.save_for_backward(tokens, product if save_products else None, norm_weight, norm_bias, *others)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        tokens, product, norm_weight, norm_bias, *others = ctx.saved_tensors
        eps, activation, _, dtype, scalings = ctx.how
        needs = ctx.needs_input_grad[2:]
        with _autocast_off(tokens):
            first, second = affines_of(others, scalings)
            first = first.cast(dtype)
            normalized, mean, rstd = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
            normalized = normalized.to(dtype).flatten(0, 1)
            product = first.product(normalized) if product is None else product.flatten(0, 1)
            gradient = gradient.flatten(0, 1)
            second = second.cast(dtype)
            narrow = second.narrow(gradient)
            hidden = activation.forward(product) if needs[6] or needs[8] or needs[9] else None
            found = second.of_tensors(gradient, narrow, hidden, needs[6:])
            del hidden  # one wide tensor less at the peak
            gradient = activation.backward(second.of_inputs(gradient, narrow), product)
            del product, second
            narrow = first.narrow(gradient)
            found = first.of_tensors(gradient, narrow, normalized, needs[2:6]) + found
            gradient = first.of_inputs(gradient, narrow).view_as(tokens)
            into = _norm_gradients(ctx, gradient, tokens, mean, rstd, norm_weight, norm_bias, needs)
        return into[0], None, *into[1:], *_like(others, found)


class _LeanProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, how: Any, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        ctx.how = eps, num_queries, dtype, scalings = how
        norm_weight, norm_bias, *others = parameters
        with _autocast_off(tokens):
            normalized = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)[0].to(dtype)
            outputs = tuple(
                affine.cast(dtype).product(normalized[:, :num_queries] if i == 0 else normalized)
                for i, affine in enumerate(affines_of(others, scalings))
            )
        others[1::4] = [None] * 3  # biases
        ctx.save_for_backward(tokens, norm_weight, norm_bias, *others)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        tokens, norm_weight, norm_bias, *others = ctx.saved_tensors
        eps, num_queries, dtype, scalings = ctx.how
        needs = ctx.needs_input_grad[2:]
        with _autocast_off(tokens):
            normalized, mean, rstd = _layer_norm(tokens, tokens.shape[-1:], norm_weight, norm_bias, eps)
            normalized = normalized.to(dtype)
            found: list[Tensor | None] = []
            projections, narrows = [affine.cast(dtype) for affine in affines_of(others, scalings)], []
            flat = [g.flatten(0, 1) for g in gradients]
            for i, (gradient, affine) in enumerate(zip(flat, projections, strict=True)):
                inputs = normalized[:, :num_queries] if i == 0 else normalized
                narrows.append(affine.narrow(gradient))
                found += affine.of_tensors(gradient, narrows[i], inputs.flatten(0, 1), needs[2 + 4 * i : 6 + 4 * i])
            query, key, value = projections
            onto = value.of_inputs(flat[2], narrows[2], key.of_inputs(flat[1], narrows[1]))
            if num_queries is None:
                gradient_in = query.of_inputs(flat[0], narrows[0], onto).view_as(tokens)
            else:
                gradient_in = onto.view_as(tokens)
                asked = gradient_in[:, :num_queries]
                asked += query.of_inputs(flat[0], narrows[0]).view_as(asked)
            into = _norm_gradients(ctx, gradient_in, tokens, mean, rstd, norm_weight, norm_bias, needs)
        return into[0], None, *into[1:], *_like(others, found)


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


def _like(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Gradients in the dtypes of what they are of; a bias has that of its weight."""
    for i, gradient in enumerate(gradients):
        like = tensors[i - 1 if i % 4 == 1 else i]
        yield None if gradient is None or like is None else gradient.to(like.dtype)


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


def _autocast_off(tokens: Tensor) -> Any:
    return torch.autocast(tokens.device.type, enabled=False)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise ForwardError(
            "lean blocks have no second derivatives (`create_graph=True` asks for them). Attach the adapter with "
            '`lean="off"`.'
        )


__all__ = ["Activation", "lean_mlp", "lean_projections", "recomputed"]
