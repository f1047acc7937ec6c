"""A training step on tensors without memory: every operation runs without computing values, and every byte is counted.

It uses torch's fake tensors, which have a shape, a dtype and a device that need not exist. The operations of the real
step decide what is allocated, saved for backward and freed, so that the prediction follows the code for any model and
any adapter.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from peft_bsr.compat.torch_api import storage_key
from peft_bsr.compat.transformers_api import CHECKPOINT_FUNCTION
from peft_bsr.cost.flops import Operator, flops_of
from peft_bsr.engine import LivingBytes, watch_kept

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Description = tuple[torch.Size, torch.dtype, torch.device]


@dataclass(frozen=True)
class DryRun:
    """Memory and FLOPs of a forward and a backward, in bytes. The three parts add up to the peak.

    Attributes:
        peak_bytes: Peak memory, including inputs, without memory allocated before (weights).
        gradient_bytes: Gradients of parameters in memory at the peak.
        activation_bytes: Activations saved for backward, in memory at the peak.
        workspace_bytes: All other memory at the peak.
        saved_bytes: All activations saved for backward, at the end of the forward.
        flops: FLOPs of forward and backward.
    """

    peak_bytes: int
    gradient_bytes: int
    activation_bytes: int
    workspace_bytes: int
    saved_bytes: int
    flops: int

    def scaled(self, saved_bytes: int) -> DryRun:
        """The same step with `saved_bytes` saved for backward: activations at the peak are scaled in proportion."""
        activations = round(self.activation_bytes * saved_bytes / max(1, self.saved_bytes))
        peak = self.peak_bytes - self.activation_bytes + activations
        return replace(self, peak_bytes=peak, activation_bytes=activations, saved_bytes=saved_bytes)


class HostMemory:
    """CPU memory that holds the inputs of checkpointed blocks until the backward.

    Attributes:
        most_bytes: Peak of this memory.
    """

    def __init__(self) -> None:
        self.most_bytes = self._bytes = 0

    def take_inputs_of_checkpoints(self, model: nn.Module) -> None:
        """Wrap the checkpoint of every block in saved-tensor hooks, as transformers does with `offload`."""
        for module in model.modules():
            checkpoint = getattr(module, CHECKPOINT_FUNCTION, None)
            if checkpoint is not None:
                setattr(module, CHECKPOINT_FUNCTION, partial(self._call, checkpoint))

    def _call(self, checkpoint: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with torch.autograd.graph.saved_tensors_hooks(self._take, self._give):
            return checkpoint(*args, **kwargs)

    def _take(self, tensor: Tensor) -> _Description:
        self._bytes += tensor.nbytes
        self.most_bytes = max(self.most_bytes, self._bytes)
        return tensor.shape, tensor.dtype, tensor.device

    def _give(self, kept: _Description) -> Tensor:
        shape, dtype, device = kept
        back = torch.empty(shape, dtype=dtype, device=device)
        self._bytes -= back.nbytes
        return back


def without_memory(model: nn.Module, device: str | torch.device) -> nn.Module:
    """A copy of `model` whose tensors have no memory. Call it inside `no_memory()`.

    Args:
        model: Model on any device, including meta.
        device: Device of the fake tensors; it need not exist.
    """
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(model, memo)


def dry_run(model: nn.Module, inputs: Iterable[Tensor], forward: Callable[[], Tensor]) -> DryRun:
    """Run the forward and backward of a model without memory. Call it inside `no_memory()`.

    Args:
        model: Model from `without_memory`; it gets gradients.
        inputs: Inputs of the forward; they stay in memory for the whole step.
        forward: Runs the model and returns the loss.
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
    """Records when memory is allocated and freed."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (address of a storage, 1 or -1), in chronological order
        self.kept: set[int] = set()  # saved for backward
        self.flops = 0
        self._watched: list[weakref.ref[torch.UntypedStorage]] = []

    def keep(self, tensor: Tensor) -> Tensor:
        """Hook for autograd: record a tensor that is saved for backward."""
        self.note(tensor)
        self.kept.add(storage_key(tensor.untyped_storage()))
        return tensor.detach()

    def peak(self) -> tuple[int, set[int]]:
        """Peak in bytes, and the storages in memory at the peak."""
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

    def __torch_dispatch__(
        self,
        function: Operator,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        output = super().__torch_dispatch__(function, types, args, kwargs)
        self.flops += flops_of(function, args, kwargs or {}, output)
        return output


__all__ = ["DryRun", "dry_run", "without_memory"]
