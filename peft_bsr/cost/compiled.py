"""Predicts what a compiled model saves for backward: torch's partitioner runs on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from peft_bsr.compat.torch_api import recompile_limit, saved_in_node, storage_key
from peft_bsr.errors import UnsupportedModelError

_BACKEND = "aot_eager_decomp_partition"  # inductor's decompositions and partitioner, without its kernels
_LIMIT = 2**20  # every model adds one compilation


def kept_when_compiled(model: nn.Module, forward: Callable[[Callable[..., object]], Tensor]) -> int:
    """Bytes that `torch.compile(model)` saves for backward, including saved inputs.

    Args:
        model: Model from `without_memory`. Call this outside of any dispatch mode: Dynamo does not compile inside one.
        forward: Calls its argument, the compiled model, and returns the loss.

    Raises:
        UnsupportedModelError: If it cannot be compiled without memory.
    """
    try:
        with recompile_limit(_LIMIT):
            loss = forward(torch.compile(model, backend=_BACKEND))
    except Exception as error:
        raise UnsupportedModelError(
            f"What {type(model).__name__} keeps when it is compiled could not be predicted ({type(error).__name__}). "
            "Use `compile=False`: lean blocks keep the same in eager mode, other blocks at least as much."
        ) from error
    weights = {storage_key(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    held = {storage_key(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in _kept(loss)}
    return sum(size for storage, size in held.items() if storage not in weights)


def _kept(loss: Tensor) -> Iterator[Tensor]:
    """Tensors saved by the nodes of an autograd graph."""
    nodes: list[Node | None] = [loss.grad_fn]
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        yield from saved_in_node(node)


__all__ = ["kept_when_compiled"]
