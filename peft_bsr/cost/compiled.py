"""What a compiled model keeps for backward, without a run: torch's partitioner decides it on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.compat.torch_api import recompile_limit, saved_in_node, storage_key
from peft_bsr.errors import UnsupportedModelError

_BACKEND = "aot_eager_decomp_partition"  # inductor's decompositions and partitioner, without its kernels
_LIMIT = 2**20  # each model is one compilation more


def kept_when_compiled(model: nn.Module, forward: Callable[[Any], Tensor]) -> int:
    """Bytes that `torch.compile(model)` keeps for backward, inputs that it keeps too.

    Args:
        model: From `without_memory`, outside of any dispatch mode: Dynamo leaves alone what runs in one.
        forward: Calls what it is given, which is compiled, and gives the loss.

    Raises:
        UnsupportedModelError: If it cannot be compiled without memory.
    """
    try:
        with recompile_limit(_LIMIT):
            loss = forward(torch.compile(model, backend=_BACKEND))
    except Exception as error:
        raise UnsupportedModelError(
            f"What {type(model).__name__} keeps when it is compiled could not be predicted ({type(error).__name__}). "
            "Leave `compile` out: lean blocks keep the same in eager mode, others as much or more."
        ) from error
    weights = {storage_key(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
    held = {storage_key(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in _kept(loss)}
    return sum(size for storage, size in held.items() if storage not in weights)


def _kept(loss: Tensor) -> Iterator[Tensor]:
    """What the nodes of a graph have saved."""
    nodes: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        yield from saved_in_node(node)


__all__ = ["kept_when_compiled"]
