"""Tokens grouped by the expert that computes them, and the product of each group with its expert's weights.

Two layouts. By size: groups one after the other, which needs their sizes in Python. By block: groups padded to blocks
of one size, whose number is known in advance, so that no shape depends on the data: a GPU is never waited for, and
graphs (`torch.compile`, `torch.export`, ONNX, CUDA graphs) can have it. No token is ever dropped.

Shapes: n tokens, E experts, k of them chosen for each token, R rows of all groups, D inputs, F outputs of a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_bsr.core.quantized import in_dtype

_BLOCKS = 4  # blocks that an expert with an even share of the tokens fills; each expert pads one more at most
_ALIGNED = 8  # rows of a block are a multiple of it, for tensor cores
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Groups:
    """Where the tokens of each expert are.

    Args:
        experts: [n, k] int64, those chosen for each token, no expert twice for one token.
        num_experts: E.
        by_block: Layout by blocks: the products cost 5/4 of those by size, at most those of all experts on all tokens.
            They cost the latter in a graph to export, whose batch has any size. False: by size.

    Attributes:
        shape: (R,), or (blocks, rows of a block).
        rows: [R] int64, the token of each row; of rows that pad, any.
        places: [n k] int64, the row of each choice.
        product: ([*shape, D], weights [E, F, D], biases [E, F] or None) -> [*shape, F], each row with its expert's.
            Under autocast in its dtype.
    """

    shape: tuple[int, ...]

    def __init__(self, experts: Tensor, num_experts: int, by_block: bool) -> None:
        (num_tokens, top_k), device = experts.shape, experts.device
        chosen = experts.flatten()
        seen = (chosen == torch.arange(num_experts, device=device)[:, None]).cumsum(dim=1)  # [E, n k]
        ranks, counts = seen.gather(0, chosen[None])[0] - 1, seen[:, -1]
        if by_block:
            size, num_blocks = num_tokens, num_experts  # no expert has more rows than there are tokens
            is_exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
            if not is_exported and (_BLOCKS + 1) * top_k < _BLOCKS * num_experts:
                size = -(-num_tokens * top_k // (_BLOCKS * num_experts * _ALIGNED)) * _ALIGNED
                num_blocks = (_BLOCKS + 1) * num_experts
            ends = ((counts + size - 1) // size).cumsum(dim=0)
            blocks = torch.arange(num_blocks, device=device)[:, None]
            owners = (blocks >= ends).sum(dim=1).clamp_max(num_experts - 1)
            starts, self.shape = torch.cat([ends.new_zeros(1), ends[:-1]]) * size, (num_blocks, size)

            def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                kind = inputs.device.type
                dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
                output: Tensor = _BlockProduct.apply(in_dtype(inputs, dtype), weight, bias, owners)
                return output
        else:
            sizes: list[int] = counts.tolist()
            starts, self.shape = counts.cumsum(dim=0) - counts, (num_tokens * top_k,)

            def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                # unbound once: a gradient per expert, stacked, where indexing would add up E tensors of the full size
                biases = (None,) * len(sizes) if bias is None else bias.unbind()
                parts = zip(inputs.split(sizes), weight.unbind(), biases, strict=True)
                return torch.cat([linear(part, own, shift) for part, own, shift in parts if len(part)])

        self.product: Product = product
        self.places = starts[chosen] + ranks
        tokens = torch.arange(num_tokens, device=device)[:, None].expand(num_tokens, top_k).flatten()
        # rows that pad are many tokens, none of them often: their gradients of zero are added one by one
        padding = torch.arange(math.prod(self.shape), device=device) % counts.new_full((), num_tokens)
        self.rows = padding.scatter(0, self.places, tokens)


class _BlockProduct(torch.autograd.Function):
    """Blocks [M, rows, D] times the weights of their owners, E blocks at a time: no more weights are copied at once."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, owners: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight, owners)
        ctx.bias_dtype = None if bias is None else bias.dtype
        outputs = []
        for part, own in _slices(weight, inputs, owners):
            taken = in_dtype(weight.index_select(0, own), part.dtype).mT
            if bias is None:
                outputs.append(torch.bmm(part, taken))
            else:
                outputs.append(torch.baddbmm(in_dtype(bias.index_select(0, own), part.dtype)[:, None], part, taken))
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, owners = ctx.saved_tensors
        of_inputs = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            slices = _slices(weight, gradient, owners)
            of_inputs = torch.cat(
                [torch.bmm(part, in_dtype(weight.index_select(0, own), part.dtype)) for part, own in slices]
            )
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight)
            for part, seen, own in _slices(weight, gradient, inputs, owners):
                of_weight = of_weight.index_add_(0, own, in_dtype(torch.bmm(part.mT, seen), weight.dtype))
        if ctx.needs_input_grad[2]:
            sums = gradient.sum(dim=1, dtype=ctx.bias_dtype)
            of_bias = sums.new_zeros(weight.shape[0], sums.shape[1]).index_add_(0, owners, sums)
        return of_inputs, of_weight, of_bias, None


def _slices(weight: Tensor, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(tensor.split(weight.shape[0]) for tensor in tensors), strict=True)


__all__ = ["Groups", "Product"]
