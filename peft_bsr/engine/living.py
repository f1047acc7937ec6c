"""Counts the bytes of tensors that are still alive, independently of what holds them."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
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
    """Dispatch mode that records the storage of every new tensor and counts the bytes that are still alive.

    After a forward these are the bytes kept for backward, by autograd, the `ctx` of a function, a module or a closure.
    Storages that existed before (parameters, buffers, inputs) are not counted. Each storage counts once, with its full
    size; for a wrapper tensor (torchao's), the inner tensors count. Works on any device, and with fake tensors. Memory
    that torch allocates without an operation (states of random generators) is not counted.

    Exit `torch.autocast` inside this context: until then, its cache holds a copy of each weight that was cast.

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
        # weak, to the storage, not its Python object; while one is here, its address is not used again
        self._references: dict[int, StorageWeakRef] = {}

    def bytes(self, exclude: Iterable[Tensor] = (), collects: bool = True) -> int:
        """Bytes alive now.

        Args:
            exclude: Tensors whose storages are not counted, such as the loss that the caller holds.
            collects: Whether to collect garbage first, so that reference cycles are not counted. Default True.
        """
        return sum(self.sizes[number] for number in self.alive(exclude, collects))

    def alive(self, exclude: Iterable[Tensor] = (), collects: bool = True) -> set[int]:
        """Addresses of the storages that are alive now; see `bytes`."""
        if collects:
            gc.collect()
        alive = {number for number, reference in self._references.items() if not reference.expired()}
        return alive - {storage_key(storage) for tensor in exclude for storage in _storages(tensor)}

    def note(self, tensor: Tensor, is_new: bool = True) -> None:
        """Record a tensor's storages, unless they are recorded already.

        Args:
            tensor: The tensor.
            is_new: Whether its bytes count; False for tensors that existed before.
        """
        for storage in _storages(tensor):
            number = storage_key(storage)
            if number not in self.sizes:
                self.sizes[number] = storage.nbytes() if is_new else 0
                self._references[number] = StorageWeakRef(storage)
                self._appeared(storage)

    def _appeared(self, storage: torch.UntypedStorage) -> None:
        """Called when a storage is recorded for the first time; for subclasses."""

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if function is not torch.ops.aten.lift_fresh.default:  # its argument is new: `torch.tensor` made it
            for tensor in _tensors((args, kwargs)):
                self.note(tensor, is_new=False)
        output = function(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self.note(tensor)
        return output


def _tensors(values: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(tensor):  # its own storage has a size, but no memory
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()


__all__ = ["LivingBytes"]
