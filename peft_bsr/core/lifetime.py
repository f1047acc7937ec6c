"""Tensors of a forward that somebody reads after it."""

from __future__ import annotations

import torch
from torch import Tensor

_OUTSIDE = [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else []  # not in torch 2.7


def outliving(tensor: Tensor) -> Tensor:
    """A copy without a gradient that holds after the next forward too, also where that replays a CUDA graph.

    All memory of a CUDA graph (`mode="reduce-overhead"`) is overwritten when the graph runs again, a clone in it as
    well. So a compiler gets an operator that is marked to stay outside of such graphs.

    Source: https://docs.pytorch.org/docs/stable/torch.compiler_cudagraph_trees.html
    """
    if torch.compiler.is_compiling():
        copied: Tensor = _copied(tensor)
        return copied
    return tensor.detach().clone()


@torch.library.custom_op("peft_bsr::copied_outside", mutates_args=(), tags=_OUTSIDE)
def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


@_copied.register_fake
def _copied_shape(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


__all__ = ["outliving"]
