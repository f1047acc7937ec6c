"""Bytes of tensors that are still alive, counted from outside: nothing that runs is asked what it keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from peft_bsr.compat.torch_api import (
    StorageWeakRef,
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    storage_key,
    tree_leaves,
)


class LivingBytes(TorchDispatchMode):
    """Notes the storage of every tensor that an operation makes inside, and says how much of it is alive.

    After a forward that is what is kept for backward, whoever holds it: autograd, the `ctx` of a function, a module or
    a closure. Storages that were there before are not counted: parameters, buffers, inputs. Each storage counts once
    and whole; of a tensor that wraps others (torchao's), the inner ones count. Works on any device, also with fake
    tensors. What torch allocates without an operation (states of random generators) is not seen.

    Close `torch.autocast` inside: while it is open, its cache keeps a copy of each weight that was cast.

    Examples:
        >>> layer = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh())
        >>> with LivingBytes() as living:
        ...     loss = layer(torch.randn(3, 4)).sum()
        >>> living.bytes(exclude=[loss])  # made inside: the input 3 x 4 x 4 bytes, and the output of Tanh 3 x 2 x 4
        72
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # address of a storage -> bytes
        # weak, of the storage itself, not of its Python object; and as long as one is there, no other gets its address
        self._references: dict[int, StorageWeakRef] = {}

    def bytes(self, exclude: Iterable[Tensor] = (), collects: bool = True) -> int:
        """Bytes alive now.

        Args:
            exclude: Tensors whose storages do not count: what the caller holds itself, such as the loss.
            collects: Collect garbage first, so that what only cycles of objects hold does not count.
        """
        return sum(self.sizes[number] for number in self.alive(exclude, collects))

    def alive(self, exclude: Iterable[Tensor] = (), collects: bool = True) -> set[int]:
        """Addresses of the storages that are alive now; see `bytes`."""
        if collects:
            gc.collect()
        alive = {number for number, reference in self._references.items() if not reference.expired()}
        return alive - {storage_key(storage) for tensor in exclude for storage in _storages(tensor)}

    def note(self, tensor: Tensor, is_new: bool = True) -> None:
        """Note a tensor's storages, unless they are known.

        Args:
            tensor: Any.
            is_new: Whether they count; False for what was there before.
        """
        for storage in _storages(tensor):
            number = storage_key(storage)
            if number not in self.sizes:
                self.sizes[number] = storage.nbytes() if is_new else 0
                self._references[number] = StorageWeakRef(storage)
                self._appeared(storage)

    def _appeared(self, storage: torch.UntypedStorage) -> None:
        """For a subclass: a storage is noted for the first time."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten.lift_fresh.default:  # `torch.tensor` makes its argument
            for tensor in _tensors((args, kwargs)):
                self.note(tensor, is_new=False)
        output = function(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self.note(tensor)
        return output


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(tensor):  # its own storage has a size, but no memory
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


__all__ = ["LivingBytes"]
