"""One row of `gpu.py`, measured in this process."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import peft
import torch
import torch._functorch.config
import transformers
from gpu_rows import BUDGETS, MODELS, MOST_IMAGES, Row
from peft import get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

import peft_bsr
from peft_bsr import ALaSTConfig
from peft_bsr.cost import Estimate, PeakMemory, Setup, estimate, model_memory, parse_size, saved_activations

Figures = dict[str, Any]

WARM_UP = 3
LEAST, MOST, TIMED_SECONDS = 8, 30, 2.0  # number of timed steps, by their duration
FULL_ENOUGH = 0.95  # share of the memory at which the search for the largest batch stops


def environment(device: str) -> dict[str, str]:
    """What the figures depend on, except for the commit."""
    found = {"card": f"CPU, {torch.get_num_threads()} threads", "driver": "none"}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            found["driver"] = "unknown"
        found["card"] = torch.cuda.get_device_name()
    libraries = {"torch": torch, "transformers": transformers, "peft": peft}
    return found | {name: str(library.__version__) for name, library in libraries.items()}


def measure(row: Row, size: str, device: str, memory: str) -> Figures:
    """Measure a row. If that fails, the figures contain the error.

    Args:
        row: Row of `ROWS`.
        size: Key of `MODELS`.
        device: `"cuda"` or `"cpu"`.
        memory: Memory for the largest batch, a string such as `"24GiB"`.
    """
    warnings.filterwarnings("ignore")
    begin = time.perf_counter()
    try:
        with ExitStack() as stack:
            if row.mode in BUDGETS:
                budget = torch._functorch.config.patch(activation_memory_budget=BUDGETS[row.mode])
                stack.enter_context(budget)
            found = {"status": "measured"} | Training(row, size, device).figures(parse_size(memory))
    except torch.OutOfMemoryError as error:
        found = {"status": "out of memory", "error": short(error)}
    except Exception as error:  # an error of one row must not stop the others
        found = {"status": "failed", "error": short(error)}
    return found | {"seconds": round(time.perf_counter() - begin, 1)}


class Training:
    """A model in training: bf16 autocast over its weights, AdamW.

    Args:
        row: Row of `ROWS`.
        size: Key of `MODELS`.
        device: `"cuda"` or `"cpu"`.
    """

    def __init__(self, row: Row, size: str, device: str) -> None:
        torch.manual_seed(0)
        self.row, self.device, self.sizes = row, device, MODELS[size][row.model]
        self.most_images = MOST_IMAGES[size]
        base = row.base(self.sizes, device).train()
        begin = time.perf_counter()
        config = row.config(self.sizes)
        self.model = (base if config is None else get_peft_model(base, config)).train()
        self.attach_seconds = time.perf_counter() - begin
        if "checkpointing" in row.mode:
            offload = {"offload": True} if row.mode.startswith("offloaded") else {}  # transformers' own, pinned memory
            base.gradient_checkpointing_enable({"use_reentrant": False}, **offload)
        compiles = peft_bsr.compile if isinstance(config, ALaSTConfig) else torch.compile
        self.run = compiles(self.model) if row.compiles else self.model
        self.optimizer = _adamw(row.optimizer, self.model, device)
        self.batch: dict[str, Tensor] = {}

    def load(self, size: int) -> None:
        """Create a batch of random images on the device; the previous one is freed."""
        self.batch = {}
        pixels = self.sizes["image_size"]
        self.batch["pixel_values"] = torch.randn(size, 3, pixels, pixels, device=self.device)
        self.batch["labels"] = torch.arange(size, device=self.device) % 100

    def forward(self) -> Tensor:
        """The loss."""
        with torch.autocast(self.device, torch.bfloat16):
            return self.run(**self.batch).loss

    def step(self) -> None:
        """Forward, backward, update; gradients are None afterwards."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def figures(self, memory: int) -> Figures:
        """All figures of the row.

        Args:
            memory: Memory for the largest batch, in bytes.
        """
        size = min(self.row.batch or self._largest(memory), self.most_images)
        self.load(size)
        begin, graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
        for _ in range(WARM_UP):
            self.step()
        self._wait()
        warm_up = time.perf_counter() - begin
        compiled, begin = counters["stats"]["unique_graphs"], time.perf_counter()
        self.step()
        self._wait()
        once = time.perf_counter() - begin
        times, host = self._times(max(LEAST, min(MOST, math.ceil(TIMED_SECONDS / once))))
        median = statistics.median(times)
        found = {
            "batch": size,
            "images_per_s": round(size / median, 1),
            "step_ms": _milli(median),
            "step_ms_range": [_milli(min(times)), _milli(max(times))],
            "steps": len(times),
            "host_ms": _milli(statistics.median(host)) if host else None,
            "attach_s": round(self.attach_seconds, 1),
            "warm_up_s": round(warm_up - WARM_UP * median, 1),
            "graphs": compiled - graphs if self.row.compiles else 0,
            "compiled_while_timed": self.row.compiles and counters["stats"]["unique_graphs"] != compiled,
            "trained": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "optimizer": f"{type(self.optimizer).__module__.partition('.')[0]}.{type(self.optimizer).__name__}",
            "kept_mib_per_image": _mib(self._kept() / size),
        }
        state, allocated, reserved = self._peak(size)
        found |= {"state_mib": _mib(state), "peak_allocated_mib": _mib(allocated)}
        found["peak_reserved_mib"] = None if reserved is None else _mib(reserved)
        return found

    def _times(self, steps: int) -> tuple[list[float], list[float]]:
        """Seconds of consecutive steps, and seconds until Python returns from a step on an idle device."""
        if self.device == "cpu":
            return [_seconds(self.step) for _ in range(steps)], []
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        self.step()  # from here on the device has work while Python prepares more
        events[0].record()
        for event in events[1:]:
            self.step()
            event.record()
        self._wait()
        times = [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(events)]
        host = []
        for _ in range(LEAST):
            host.append(_seconds(self.step))
            self._wait()
        return times, host

    def _kept(self) -> int:
        """Bytes alive between forward and backward."""
        if self.device == "cpu":
            return saved_activations(self.model, self.forward)
        self._wait()
        before = torch.cuda.memory_allocated()
        loss = self.forward()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return kept

    def _peak(self, size: int) -> tuple[int, int, int | None]:
        """Bytes that stay between steps; peak allocated and reserved above them in two steps, including the batch."""
        self.batch = {}
        if self.device == "cuda":
            self._wait()
            torch._C._cuda_clearCublasWorkspaces()  # the step allocates them again: they are part of its peak
            gc.collect()
            torch.cuda.empty_cache()
        with PeakMemory(self.device) as memory:
            self.load(size)
            for _ in range(2):
                self.step()
        if self.device == "cuda":
            reserved = torch.cuda.max_memory_reserved() - memory.start_bytes
            return memory.start_bytes, memory.added_bytes, reserved
        stays = model_memory(self.model, self.optimizer)
        return stays.trainable_bytes + stays.frozen_bytes + stays.optimizer_bytes, memory.added_bytes, None

    def _largest(self, memory: int) -> int:
        """Largest batch that fits `memory`: predicted by the planner, on CUDA corrected by measurements."""
        size, most = self._predicted(memory), 0
        if self.device == "cpu":  # a process's memory contains much else there
            return size
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total))
        self.load(1)
        self.step()  # creates the optimizer state
        for _ in range(8):
            try:
                state, taken, _ = self._peak(size)
                room = memory - state
            except torch.OutOfMemoryError:
                room, taken = 1, 2  # it is not known by how much it does not fit
            self.optimizer.zero_grad(set_to_none=True)
            if taken <= room:
                most = max(most, size)
            after = int(0.99 * size * room / taken)
            if after < 1 or FULL_ENOUGH * after <= size <= after:
                break
            size = after
        if not most:
            raise torch.OutOfMemoryError(f"no batch that fits into {memory / 2**30:.1f} GiB was found")
        return most

    def _predicted(self, memory: int) -> int:
        """Largest batch by the planner, whose peak is linear in the batch size."""
        few, many = (guess(self.row, self.sizes, size, self.device).total_bytes for size in (16, 32))
        return max(1, 16 + int(16 * (memory - few) / max(many - few, 1)))

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def guess(row: Row, sizes: Mapping[str, int], batch: int, device: str) -> Estimate:
    """The planner's prediction for the same step.

    Args:
        row: Row of `ROWS`.
        sizes: Config fields of its model.
        batch: Number of images.
        device: `"cuda"` or `"cpu"`; it need not exist.
    """
    offloads = row.mode.startswith("offloaded") and device != "cpu"  # on the CPU there is nothing to offload to
    setup = Setup(
        batch_size=batch,
        optimizer={"fused": "adamw_fused", "8-bit": "adamw_8bit"}[row.optimizer],
        device=device,
        autocast=torch.bfloat16,
        compile=row.compiles,
        gradient_checkpointing="offload" if offloads else "checkpointing" in row.mode,
    )
    torch._dynamo.reset()  # its cache ignores the budget: code compiled for another budget would be used
    with torch._functorch.config.patch(activation_memory_budget=BUDGETS.get(row.mode, 1.0)):
        return estimate(row.base(sizes, "meta"), row.config(sizes), setup)


def _adamw(kind: str, model: nn.Module, device: str) -> torch.optim.Optimizer:
    trained: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    if kind == "fused":
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)
    if device == "cuda":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            pass
        else:
            return AdamW8bit(trained, lr=1e-5)
    from torchao.optim import AdamW8bit  # compiles its update, during warm-up

    return AdamW8bit(trained, lr=1e-5)


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def short(error: BaseException) -> str:
    """Class and text of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _milli(seconds: float) -> float:
    return round(1000 * seconds, 2)


def _mib(size: float) -> float:
    return round(size / 2**20, 2)
