"""Bytes that autograd keeps for the backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from peft_bsr.compat.torch_api import storage_key
from peft_bsr.engine.int8 import watch_kept


def saved_activations(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd saves for backward in one forward, each storage once, parameters and buffers excluded.

    Args:
        model: The model. Its parameters and buffers are not counted.
        forward: Runs the model and returns the loss; it is not backpropagated.

    Returns:
        Saved bytes, on the model's device and in its dtype. On the CPU this equals what the process holds for backward,
        up to the allocator's rounding.

    Examples:
        >>> layer = torch.nn.Linear(4, 2)
        >>> saved_activations(layer, lambda: layer(torch.randn(3, 4)).sum())  # its input: 3 x 4 x 4 bytes
        48
    """
    return sum(saved_by_module(model, forward).values())


def saved_by_module(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, int]:
    """`saved_activations` by the module that was running when a storage was first saved.

    Args:
        model: See `saved_activations`.
        forward: See `saved_activations`.

    Returns:
        Name of the innermost module -> bytes, in the order of the forward; `""` is the model itself or what runs
        outside of it.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
        >>> saved_by_module(model, lambda: model(torch.randn(3, 4)).sum())  # the input, and the output of ReLU
        {'0': 48, '1': 24}
    """
    persistent = {storage_key(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again while we count
    saved: defaultdict[str, int] = defaultdict(int)
    names = {module: name for name, module in model.named_modules()}
    running = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        number = storage_key(storage)
        if number not in persistent and number not in storages:
            storages[number] = storage
            saved[running[-1]] += storage.nbytes()
        return tensor.detach()  # the tensor itself would make a reference cycle with the graph

    def enter(module: nn.Module, _: object) -> None:
        running.append(names.get(module, running[-1]))

    def leave(*_: object) -> None:
        running.pop()

    # hooks on the modules themselves would keep lean blocks from running lean
    handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), watch_kept(pack):
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    del loss
    return dict(saved)


__all__ = ["saved_activations", "saved_by_module"]
