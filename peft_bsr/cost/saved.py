"""Bytes that autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.engine import kept_tensors


def saved_activations(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for backward in one forward, each storage once, parameters and buffers excluded.

    Args:
        model: Whose parameters and buffers are not counted.
        forward: Runs the model and returns the loss; it is not backpropagated.

    Returns:
        saved bytes. Device and dtype are the model's; on the CPU this equals what the process holds for backward, up
        to the allocator's rounding.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> saved_activations(layer, lambda: layer(torch.randn(3, 4)).sum())  # its input: 3 x 4 x 4 bytes
        48
    """
    persistent = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}  # the storage is held, so that its address cannot be given away while we count

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in persistent:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), kept_tensors() as others:
        loss = forward()
    del loss
    for tensor in others:
        pack(tensor)
    return sum(storage.nbytes() for storage in storages.values())
