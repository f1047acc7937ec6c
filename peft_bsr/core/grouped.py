"""Groups tokens by expert, and multiplies each group by the weights of its expert.

Two layouts. By size: groups follow each other, which needs their sizes in Python. By block: groups are padded to blocks
of equal size, whose number is known in advance, so no shape depends on the data: it needs no host synchronization and
works in graphs (`torch.compile`, `torch.export`, ONNX, CUDA graphs). No token is dropped.

Shapes: n tokens, E experts, k of which are chosen for each token, R rows of all groups, D inputs, F outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_bsr.core.autograd import BackwardContext
from peft_bsr.core.quantized import in_dtype

_BLOCKS = 4  # blocks per expert if all have equally many tokens; each expert adds at most one block of padding
_ALIGNED = 8  # the size of a block is a multiple of this, for tensor cores
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Groups:
    """The layout of tokens grouped by expert.

    Args:
        experts: Experts of each token, [n, k] int64, all different for one token.
        num_experts: Number of experts, E.
        by_block: Whether to use the layout by blocks. Its products cost 5/4 of those by size, but at most those of all
            experts on all tokens; in graphs for export, whose batch size varies, always the latter.

    Attributes:
        shape: (R,), or (blocks, rows per block).
        rows: Token of each row, [R] int64. Rows of padding have any token.
        places: Row of each token and choice, [n k] int64.
        product: ([*shape, D], weights [E, F, D], biases [E, F] or None) -> [*shape, F], each row with the weights of
            its expert. In autocast's dtype under autocast.
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
                # `unbind` stacks one gradient per expert; indexing would add up E tensors of the full size
                biases = (None,) * len(sizes) if bias is None else bias.unbind()
                parts = zip(inputs.split(sizes), weight.unbind(), biases, strict=True)
                return torch.cat([linear(part, own, shift) for part, own, shift in parts if len(part)])

        self.product: Product = product
        self.places = starts[chosen] + ranks
        tokens = torch.arange(num_tokens, device=device)[:, None].expand(num_tokens, top_k).flatten()
        # padding uses many different tokens: gradients of one token, although zero, are added one after the other
        padding = torch.arange(math.prod(self.shape), device=device) % counts.new_full((), num_tokens)
        self.rows = padding.scatter(0, self.places, tokens)


class _BlockContext(BackwardContext):
    bias_dtype: torch.dtype | None


class _BlockProduct(torch.autograd.Function):
    """Blocks [M, rows, D] times the weights of their experts, E blocks at a time, to copy at most E weights at once."""

    @staticmethod
    def forward(ctx: _BlockContext, inputs: Tensor, weight: Tensor, bias: Tensor | None, owners: Tensor) -> Tensor:
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
    def backward(ctx: _BlockContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
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
