"""What a block saves for backward, in 8 bits: autograd's saved-tensor hooks, each few numbers on a grid of 256 steps.

Rounding is stochastic, so that the gradient's error has mean zero; its noise comes from torch's own generator, so that
a resumed run goes on equal. A tensor that several operations save is packed once: what is packed is known by its
storage (held weakly: a freed one's address may be given to another), its version and the range of memory. What is not
an activation stays as it is: parameters, what the block is called with (indices, masks, tables of positions),
attention weights, and everything smaller than a token tensor (statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.compat.torch_api import StorageWeakRef, version_of
from peft_bsr.ops import PackedTensor, group_size

_watcher: ContextVar[Callable[[Tensor], Any] | None] = ContextVar("watcher", default=None)


@contextmanager
def saved_in_int8(block: nn.Module, num_values: float, arguments: Any) -> Iterator[Callable[[bool], None]]:
    """What operations inside save for backward is packed, if it is an activation.

    Not for inside of gradient checkpointing, whose own hooks these would replace.

    Args:
        block: Whose parameters and buffers are left as they are.
        num_values: Numbers in the block's smallest token tensor; what is smaller is left as it is.
        arguments: Tensors (in tuples, lists or dicts) that are left as they are.

    Yields:
        A function that is told whether square matrices are tokens from now on: queries, keys, values and outputs of as
        many tokens as a head is wide look like attention weights, which are left as they are.
    """
    outside = (*block.parameters(), *block.buffers(), *_tensors_in(arguments))
    exact = {StorageWeakRef(tensor.untyped_storage()) for tensor in outside}
    # autocast's copies of weights are tensors of their own, known by their shape alone
    casts = any(torch.is_autocast_enabled(device) for device in {tensor.device.type for tensor in outside})
    shapes = {tuple(sorted(p.shape)) for p in block.parameters() if p.ndim == 2 and casts}
    memo: dict[Any, PackedTensor] = {}
    squares = {"are_tokens": False}

    def admit(squares_are_tokens: bool) -> None:
        squares["are_tokens"] = squares_are_tokens

    def pack(tensor: Tensor) -> Any:
        is_square = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2]  # attention weights, masks
        storage = tensor.untyped_storage()
        is_square &= not squares["are_tokens"] and not _is_split_by_heads(tensor)
        if StorageWeakRef(storage) in exact:
            _note(tensor)
            return tensor.detach()  # itself it would hold the graph that holds it, if no backward comes
        if (
            not tensor.is_floating_point()
            or tensor.numel() < num_values
            or is_square
            or tuple(sorted(tensor.shape)) in shapes
        ):
            # a piece of a larger tensor (the class token's query) would keep the whole of it
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

    def unpack(packed: Any) -> Tensor:
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
def watch_kept(note: Callable[[Tensor], Any]) -> Iterator[None]:
    """Calls `note` with what `saved_in_int8` keeps, packed or as it is: hooks further out do not see it."""
    token = _watcher.set(note)
    try:
        yield
    finally:
        _watcher.reset(token)


def _note(*tensors: Tensor) -> None:
    note = _watcher.get()
    for tensor in tensors if note is not None else ():
        note(tensor)  # type: ignore[misc]


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in values for tensor in _tensors_in(item)]


def _is_split_by_heads(tensor: Tensor) -> bool:
    """Whether it lies in memory as [B, N, H, d], as attention weights never do: heads are next to each other there."""
    return tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.stride(1) == tensor.shape[3] < tensor.stride(2)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers fill a range of memory, in whatever order of the axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


__all__ = ["saved_in_int8", "watch_kept"]
