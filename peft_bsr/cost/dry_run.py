"""A training step on tensors without memory: every operation runs, no number is computed, each byte is counted.

The tensors are torch's fake ones: they have a shape, a dtype, a device that need not exist, and the very operations of
the step decide what is made, kept for backward and let go. So what is predicted is what the code does, whatever the
model, the adapter or the rewrite.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.compat.torch_api import storage_key
from peft_bsr.compat.transformers_api import CHECKPOINT_FUNCTION
from peft_bsr.cost.flops import flops_of
from peft_bsr.engine import LivingBytes, watch_kept


@dataclass(frozen=True)
class DryRun:
    """What a forward and a backward took, in bytes and FLOPs. The three parts of the peak add up to it.

    Attributes:
        peak_bytes: Most that was alive at a time, inputs too, without what was there before (weights).
        gradient_bytes: Gradients of parameters alive at the peak.
        activation_bytes: Kept for backward and alive at the peak.
        workspace_bytes: The rest at the peak.
        saved_bytes: Kept for backward, all of it (at the end of the forward).
        flops: Of forward and backward.
    """

    peak_bytes: int
    gradient_bytes: int
    activation_bytes: int
    workspace_bytes: int
    saved_bytes: int
    flops: int

    def scaled(self, saved_bytes: int) -> DryRun:
        """The same step if it keeps `saved_bytes` for backward: what is alive at the peak is as much less or more."""
        activations = round(self.activation_bytes * saved_bytes / max(1, self.saved_bytes))
        peak = self.peak_bytes - self.activation_bytes + activations
        return replace(self, peak_bytes=peak, activation_bytes=activations, saved_bytes=saved_bytes)


class HostMemory:
    """Where inputs of checkpointed blocks wait for backward, off the device.

    Attributes:
        most_bytes: That were there at a time.
    """

    def __init__(self) -> None:
        self.most_bytes = self._bytes = 0

    def take_inputs_of_checkpoints(self, model: nn.Module) -> None:
        """As transformers does with `offload`: saved-tensor hooks around the checkpoint of every block."""
        for module in model.modules():
            checkpoint = getattr(module, CHECKPOINT_FUNCTION, None)
            if checkpoint is not None:
                setattr(module, CHECKPOINT_FUNCTION, partial(self._call, checkpoint))

    def _call(self, checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self._take, self._give):
            return checkpoint(*args, **kwargs)

    def _take(self, tensor: Tensor) -> Any:
        self._bytes += tensor.nbytes
        self.most_bytes = max(self.most_bytes, self._bytes)
        return tensor.shape, tensor.dtype, tensor.device

    def _give(self, kept: Any) -> Tensor:
        shape, dtype, device = kept
        back = torch.empty(shape, dtype=dtype, device=device)
        self._bytes -= back.nbytes
        return back


def without_memory(model: nn.Module, device: str | torch.device) -> nn.Module:
    """A copy of `model` whose tensors have no memory. Inside of `no_memory()`.

    Args:
        model: On any device, also meta.
        device: Where the copy pretends to be; it need not exist.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo)


def dry_run(model: nn.Module, inputs: Iterable[Tensor], forward: Callable[[], Tensor]) -> DryRun:
    """Forward and backward of a model without memory. Inside of `no_memory()`.

    Args:
        model: From `without_memory`; its gradients are made.
        inputs: Of the forward; they are there all the time.
        forward: Runs it and gives the loss.
    """
    ledger = _Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.note(tensor, is_new=False)
    for tensor in inputs:
        ledger.note(tensor)
    with ledger, watch_kept(ledger.keep):
        with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor):
            loss = forward()
        saved_bytes = sum(ledger.sizes[number] for number in ledger.kept)
        loss.backward()
    gradients = {storage_key(p.grad.untyped_storage()) for p in model.parameters() if p.grad is not None}
    peak, alive = ledger.peak()
    parts = [sum(ledger.sizes[n] for n in alive & chosen) for chosen in (gradients, ledger.kept - gradients)]
    return DryRun(peak, parts[0], parts[1], peak - sum(parts), saved_bytes, ledger.flops)


class _Ledger(LivingBytes):
    """Writes down when memory is taken and given back."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (address of a storage, 1 or -1) in the order of time
        self.kept: set[int] = set()  # for backward
        self.flops = 0
        self._watched: list[Any] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """For autograd: what is saved for backward."""
        self.note(tensor)
        self.kept.add(storage_key(tensor.untyped_storage()))
        return tensor.detach()

    def peak(self) -> tuple[int, set[int]]:
        """Most bytes at a time, and the storages that were alive then."""
        alive: set[int] = set()
        total = most = 0
        at_most: set[int] = set()
        for number, change in self.events:
            (alive.add if change > 0 else alive.discard)(number)
            total += change * self.sizes[number]
            if total > most:
                most, at_most = total, set(alive)
        return most, at_most

    def _appeared(self, storage: torch.UntypedStorage) -> None:
        number = storage_key(storage)
        self.events.append((number, 1))
        self._watched.append(weakref.ref(storage, lambda _: self.events.append((number, -1))))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(function, types, args, kwargs)
        self.flops += flops_of(function, args, kwargs or {}, output)
        return output


__all__ = ["DryRun", "dry_run", "without_memory"]
