"""Copies tensors that are read after the forward."""

from __future__ import annotations

import torch
from torch import Tensor

_OUTSIDE = [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else []  # not in torch 2.7


def outliving(tensor: Tensor) -> Tensor:
    """A detached copy that stays valid after the next forward, even if that replays a CUDA graph.

    A CUDA graph (`mode="reduce-overhead"`) overwrites all its memory when it is replayed, including clones made in it.
    In compiled code, the copy is therefore made by an operator that is tagged to run outside of CUDA graphs.

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
