"""Checks of a written file: its outputs against PyTorch's, its time against the unreduced model's."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peft_bsr.exporting.formats import Run

TOLERANCE = 1e-4  # in fp32, of the largest output where that is above 1
_REPEATS = 7


@dataclass(frozen=True)
class ExportReport:
    """A written file and its measurements.

    Attributes:
        format: `"onnx"`, `"torch.export"` or `"executorch"`.
        path: The file.
        file_bytes: Its size, including external weights.
        quantize: `"int8"` or None.
        input_name: Name of the input.
        input_shape: Shape of the input, with None for a dynamic batch size.
        token_counts: (tokens in the attention, tokens in the MLP) of every block. Empty for models in which no token
            can be dropped: their stages and windows count differently.
        versions: Versions of Python, torch and the runtime.
        image_processor: Origin of the image processor that the file describes, or None.
        max_difference: Largest absolute difference of its outputs from PyTorch's; None if it was not checked.
        batch_size: Images in the timed batch.
        threads: Number of threads; None if the runtime chooses.
        seconds: Median time of that batch; None if it was not checked.
        unreduced_seconds: The same for the model without token reduction, in the same format and quantisation; None if
            it was not checked or nothing is reduced.
    """

    format: str
    path: Path
    file_bytes: int
    quantize: str | None
    input_name: str
    input_shape: tuple[int | None, ...]
    token_counts: list[tuple[int, int]]
    versions: dict[str, str]
    image_processor: str | None = None
    max_difference: float | None = None
    batch_size: int | None = None
    threads: int | None = None
    seconds: float | None = None
    unreduced_seconds: float | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than the unreduced model; None if it was not measured."""
        if self.seconds is None or self.unreduced_seconds is None:
            return None
        return self.unreduced_seconds / self.seconds

    def describe(self) -> str:
        """The report in a few lines."""
        shape = ["any" if size is None else str(size) for size in self.input_shape]
        kind = "int8 weights" if self.quantize else "fp32"
        lines = [
            f"{self.format}, {kind}: {self.path}, {self.file_bytes / 1e6:.1f} MB, "
            f"{self.input_name} [{', '.join(shape)}]"
        ]
        if self.token_counts:
            first, last = self.token_counts[0][0], self.token_counts[-1][1]
            lines[0] += f", {first} tokens into the first block, {last} out of the last"
        if self.image_processor is not None:
            lines.append(f"preprocessing: in the file, {self.image_processor}")
        elif self.format == "onnx":
            lines.append("preprocessing: not in the file, so `predict` cannot use it; pass `image_processor`")
        if self.max_difference is not None:
            lines.append(f"outputs: within {self.max_difference:.1e} of PyTorch's in fp32")
        if self.seconds is not None:
            lines.append(f"latency: {1e3 * self.seconds:.1f} ms per batch of {self.batch_size}")
            if self.unreduced_seconds is not None:
                lines[-1] += (
                    f", {1e3 * self.unreduced_seconds:.1f} ms without token reduction: {self.speedup:.2f} x faster"
                )
            threads = "its runtime's" if self.threads is None else self.threads
            lines[-1] += f" (CPU, {threads} threads, median of {_REPEATS} alternating runs)"
        lines.append(", ".join(f"{name} {version}" for name, version in self.versions.items()))
        return "\n".join(lines)


def largest_difference(found: list[Tensor], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """Largest absolute difference, and largest absolute value or 1, whichever is more.

    Args:
        found: Outputs of the file.
        expected: PyTorch's outputs.
    """
    pairs = list(zip(found, expected, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    return difference, max(1.0, *(float(b.abs().max()) for _, b in pairs))


def median_seconds(runs: Mapping[str, Run], images: Tensor, repeats: int = _REPEATS) -> dict[str, float]:
    """Median time of each function, run alternately so that other load affects all of them, after one warm-up run.

    Args:
        runs: Name -> function of images.
        images: [B, C, H, W].
        repeats: Timed runs of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run(images)
        for _ in range(repeats):
            for name, run in runs.items():
                begin = time.perf_counter()
                run(images)
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of Python, torch and `packages`, by import name."""
    having = importlib.metadata.packages_distributions()  # `onnxruntime` may be that of onnxruntime-gpu
    found: dict[str, str] = {}
    for name in ("torch", *packages):
        distributions = having.get(name, [name])
        found[name] = importlib.metadata.version(name if name in distributions else distributions[0])
    return {"Python": platform.python_version(), **found}


__all__ = ["TOLERANCE", "ExportReport", "largest_difference", "median_seconds", "versions_of"]
