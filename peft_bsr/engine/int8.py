"""Packs the activations that a block saves for backward into 8 bits, by autograd's saved-tensor hooks.

Each small group of numbers has its own grid of 256 steps. Rounding is stochastic, so that the gradient's error has mean
zero; the noise comes from torch's generator, so that a resumed run continues identically. A tensor that several
operations save is packed once: it is recognised by its storage (a weak reference, because addresses are used again),
its version and its range of memory. What is not an activation stays as it is: parameters, the block's arguments
(indices, masks, rotary tables), attention weights, and everything smaller than a token tensor (statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from peft_bsr.compat.torch_api import StorageWeakRef, version_of
from peft_bsr.ops import PackedTensor, group_size

Packed = tuple[PackedTensor, torch.Size, tuple[int, ...]]  # numbers, shape, stride

_watcher: ContextVar[Callable[[Tensor], object] | None] = ContextVar("watcher", default=None)


@contextmanager
def saved_in_int8(block: nn.Module, num_values: float, arguments: object) -> Iterator[Callable[[bool], None]]:
    """Context manager: activations that operations inside save for backward are packed.

    Not for use inside of gradient checkpointing: its saved-tensor hooks would be replaced.

    Args:
        block: The block. Its parameters and buffers are not packed.
        num_values: Number of values in the block's smallest token tensor; smaller tensors are not packed.
        arguments: Tensors (in tuples, lists or dicts) that are not packed.

    Yields:
        A function to call with True while square matrices are tokens, and with False otherwise. Queries, keys, values
        and outputs of as many tokens as a head is wide look like attention weights, which are not packed.
    """
    outside = (*block.parameters(), *block.buffers(), *_tensors_in(arguments))
    exact = {StorageWeakRef(tensor.untyped_storage()) for tensor in outside}
    # autocast's copies of weights are other tensors, recognised only by their shape
    casts = any(torch.is_autocast_enabled(device) for device in {tensor.device.type for tensor in outside})
    shapes = {tuple(sorted(p.shape)) for p in block.parameters() if p.ndim == 2 and casts}
    memo: dict[tuple[object, ...], PackedTensor] = {}
    squares = {"are_tokens": False}

    def admit(squares_are_tokens: bool) -> None:
        squares["are_tokens"] = squares_are_tokens

    def pack(tensor: Tensor) -> Tensor | Packed:
        is_square = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2]  # attention weights, masks
        storage = tensor.untyped_storage()
        is_square &= not squares["are_tokens"] and not _is_split_by_heads(tensor)
        if StorageWeakRef(storage) in exact:
            _note(tensor)
            return tensor.detach()  # the tensor itself would make a reference cycle with the graph, if no backward runs
        if (
            not tensor.is_floating_point()
            or tensor.numel() < num_values
            or is_square
            or tuple(sorted(tensor.shape)) in shapes
        ):
            # a view of a larger tensor (the class token's query) would keep all of it
            kept = tensor.detach()
            kept = kept.clone() if 2 * tensor.nbytes < storage.nbytes() else kept
            _note(kept)
            return kept
        dense = tensor if _is_dense(tensor) else tensor.contiguous()
        place = (StorageWeakRef(dense.untyped_storage()), version_of(dense), dense.storage_offset(), dense.numel())
        if place not in memo:
            flat = dense.detach().as_strided((dense.numel(),), (1,))
            memo[place] = PackedTensor.of(flat.view(-1, group_size(dense)))
            _note(memo[place].codes, memo[place].smallest, memo[place].step)
        return memo[place], dense.shape, dense.stride()

    def unpack(packed: Tensor | Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        numbers, shape, stride = packed
        return numbers.unpack().as_strided(shape, stride)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield admit
    finally:
        memo.clear()


@contextmanager
def watch_kept(note: Callable[[Tensor], object]) -> Iterator[None]:
    """Call `note` with each tensor that `saved_in_int8` keeps, packed or not; outer hooks do not see it."""
    token = _watcher.set(note)
    try:
        yield
    finally:
        _watcher.reset(token)


def _note(*tensors: Tensor) -> None:
    note = _watcher.get()
    if note is not None:
        for tensor in tensors:
            note(tensor)


def _tensors_in(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in values for tensor in _tensors_in(item)]


def _is_split_by_heads(tensor: Tensor) -> bool:
    """Whether the tensor [B, H, N, d] has the memory layout of [B, N, H, d], which attention weights never have."""
    return tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.stride(1) == tensor.shape[3] < tensor.stride(2)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills a range of memory without gaps, in any order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


__all__ = ["saved_in_int8", "watch_kept"]
