"""Measures real memory: of a model and its optimizer, and the peak while code runs."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from peft_bsr.compat.torch_api import storage_key
from peft_bsr.core import kept_bytes
from peft_bsr.errors import PeftBsrError

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class ModelMemory:
    """Memory that stays allocated between training steps, in bytes; tensors that share storage count once.

    Attributes:
        trainable_bytes: Parameters that require gradients.
        frozen_bytes: Other parameters, and buffers, including base weights that adapters offload to files or the CPU.
        gradient_bytes: Gradients that exist now.
        optimizer_bytes: Current optimizer state; most optimizers allocate it in their first step.
    """

    trainable_bytes: int
    frozen_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def model_memory(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ModelMemory:
    """Memory of a model and its optimizer.

    Args:
        model: A model.
        optimizer: Its optimizer. Default None.

    Examples:
        >>> layer = torch.nn.Linear(4, 2)  # 8 weights and 2 biases of 4 bytes
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> layer(torch.randn(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> model_memory(layer, optimizer)  # two moments of each, and two step counters
        ModelMemory(trainable_bytes=40, frozen_bytes=0, gradient_bytes=40, optimizer_bytes=88)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    states = [] if optimizer is None else [t for state in optimizer.state.values() for t in state.values()]
    return ModelMemory(
        trainable_bytes=_bytes(trained),
        frozen_bytes=_bytes(frozen),
        gradient_bytes=_bytes([p.grad for p in model.parameters() if p.grad is not None]),
        optimizer_bytes=_bytes([t for t in states if isinstance(t, Tensor)]),
    )


class PeakMemory:
    """Context manager that measures peak memory.

    On CUDA this is memory allocated by torch on the device. On MPS it is the same, but sampled every millisecond,
    because torch records no peak there; a shorter peak can be missed. On the CPU it is the resident set size of this
    process (Linux only), including Python, libraries and memory cached by the allocator, so that `added_bytes` is more
    meaningful than `peak_bytes`.

    Args:
        device: `"cpu"`, `"mps"` or a CUDA device. Default `"cpu"`.

    Attributes:
        start_bytes: Memory in use on entry.
        peak_bytes: Peak memory; set on exit.

    Raises:
        PeftBsrError: If the peak cannot be measured here.

    Examples:
        >>> with PeakMemory() as memory:
        ...     _ = torch.ones(2**22).sum()  # 16 MiB
        >>> memory.added_bytes >= 15 * 2**20
        True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.start_bytes = self.peak_bytes = 0
        self._samples: _Samples | None = None
        if self.device.type not in ("cpu", "cuda", "mps"):
            raise PeftBsrError(f"`device={device!r}`: peaks can be measured on CUDA, MPS and the CPU only.")

    @property
    def added_bytes(self) -> int:
        """Peak minus the memory in use on entry."""
        return self.peak_bytes - self.start_bytes

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start_bytes = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
            self._samples = _Samples(torch.mps.current_allocated_memory)
            self.start_bytes = self._samples.most
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed before must not count
            try:
                _CLEAR.write_text("5")
            except OSError as error:
                raise PeftBsrError(
                    f"The peak of this process cannot be measured: {_CLEAR} cannot be written ({error}). On the CPU "
                    "this needs Linux with /proc mounted; CUDA does not need it."
                ) from error
            self.start_bytes = _resident("VmHWM")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._samples is not None:
            torch.mps.synchronize()
            self.peak_bytes = self._samples.close()
        else:
            self.peak_bytes = _resident("VmHWM")


class _Samples:
    """Maximum of a function that a thread calls every millisecond until `close`."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read, self.most, self._end = read, read(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.001):
            self.most = max(self.most, self._read())

    def close(self) -> int:
        self._end.set()
        self._thread.join()
        return max(self.most, self._read())


def _resident(key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(key))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({storage_key(t.untyped_storage()): kept_bytes(t) for t in tensors}.values())


__all__ = ["ModelMemory", "PeakMemory", "model_memory"]
