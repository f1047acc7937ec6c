"""Cost of a training step on the host: Python calls, operations and processor time, relative to full fine-tuning.

    python benchmarks/host.py                      # all of it, about 5 minutes on 2 cores
    python benchmarks/host.py counts               # calls and operations: half a minute, the same in every run
    python benchmarks/host.py time exact low-rank  # processor time of some rows, and of full and lora
    python benchmarks/host.py --json

The model is so small that arithmetic hardly matters: a ViT with 12 blocks, 48 channels, 17 tokens (32 px, patches of
8), batch 2, random weights, one thread; fp32, and fp32 weights under bf16 autocast. A step is forward, loss and
backward with gradients set to None, without the optimizer.

- calls: calls of Python functions (`sys.setprofile`, events "call", including the step's own). They depend on Python's
  version.
- ops: operations that the dispatcher runs below autograd and autocast, except views and those that return no tensor.
- host: processor time of the process, minimum and median of all steps of `--rounds` processes. Each row runs in a new
  process: rows that alternate in one process warm each other's caches, which makes all ratios too small.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
import transformers
from own_process import in_own_process
from peft import LoraConfig, PeftConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ViTConfig, ViTForImageClassification

import peft_bsr
from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, SynQTConfig

SIZES = {"hidden_size": 48, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 192}
SIZES |= {"image_size": 32, "patch_size": 8}
LAST = {"trainable_blocks": "last:3", "reduction_blocks": [8], "keep_rate": 0.5}
ROWS: dict[str, tuple[str, Callable[[], PeftConfig | None]]] = {
    "full": ("full fine-tuning", lambda: None),
    "lora": ("PEFT's LoRA", lambda: LoraConfig(target_modules="all-linear", modules_to_save=["classifier"])),
    "stock": ("BSR stock", lambda: BSRConfig(lean="off")),
    "exact": ("BSR exact", lambda: BSRConfig()),
    "max": ("BSR max", lambda: BSRConfig(lean="max")),
    "int8": ("BSR exact, activations in int8", lambda: BSRConfig(saved_activations="int8")),
    "last3": ("BSR exact, last 3, halved at 8", lambda: BSRConfig(**LAST)),
    "low-rank": (
        "BSR exact, low-rank, all blocks and tokens",
        lambda: BSRConfig(trainable="lora", trainable_blocks="every:1", keep_rate=1.0),
    ),
    "alast": ("ALaST", lambda: ALaSTConfig()),
    "synqt": ("SynQT", lambda: SynQTConfig()),
    "exact-bf16": ("BSR exact, frozen in bf16", lambda: BSRConfig(frozen_weights="bfloat16")),
    "max-bf16": ("BSR max, frozen in bf16", lambda: BSRConfig(lean="max", frozen_weights="bfloat16")),
    "last3-bf16": (
        "BSR exact, last 3, halved at 8, frozen in bf16",
        lambda: BSRConfig(**LAST, frozen_weights="bfloat16"),
    ),
    "full-compiled": ("full fine-tuning, compiled", lambda: None),
    "exact-compiled": ("BSR exact, compiled", lambda: BSRConfig()),
    "alast-compiled": ("ALaST, halves of blocks compiled", lambda: ALaSTConfig()),
}
COMPILED = "-compiled"  # suffix of compiled rows, whose calls and operations are not counted
BASES = {"to full": "full", "to LoRA": "lora"}
MODES = {"fp32": False, "autocast": True}  # name -> whether autocast runs
# (row, mode, figure, base) -> largest allowed ratio
BARS = {
    ("exact", "fp32", "calls", "full"): 2.8,
    ("low-rank", "fp32", "calls", "full"): 3.6,
    ("alast", "fp32", "calls", "full"): 4.0,
    ("synqt", "fp32", "calls", "full"): 8.0,
    ("stock", "fp32", "ops", "full"): 0.95,
    ("exact", "fp32", "ops", "full"): 0.96,
    ("max", "fp32", "ops", "full"): 1.13,
    ("exact-bf16", "autocast", "ops", "full"): 0.75,
    ("exact", "fp32", "host", "full"): 1.2,
    ("low-rank", "fp32", "host", "lora"): 1.1,
    ("exact-bf16", "autocast", "host", "full"): 0.82,
    ("max-bf16", "autocast", "host", "full"): 1.05,
    ("last3-bf16", "autocast", "host", "full"): 0.47,
    ("exact-compiled", "fp32", "host", "full"): 0.6,
}
WARM_UP = 3

Figures = dict[str, float]


class Step:
    """A training step of a row: forward, loss, backward.

    Args:
        row: Key of `ROWS`.
        mode: Key of `MODES`.

    Raises:
        ConfigError: If this version has no such configuration, or it does not run in this mode.
    """

    def __init__(self, row: str, mode: str) -> None:
        if row.endswith("-bf16") and not MODES[mode]:
            raise ConfigError("weights in bf16 need autocast.")
        config = ROWS[row][1]()
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=10))
        self.model = (model if config is None else get_peft_model(model, config)).train()
        self.run = self.model
        if row.endswith(COMPILED):
            self.run = torch.compile(self.model, fullgraph=True) if config is None else peft_bsr.compile(self.model)
        self.batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.arange(2)}
        self.autocast = MODES[mode]
        for _ in range(WARM_UP):
            self.clear()
            self()

    def __call__(self) -> None:
        """Run it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss = self.run(**self.batch).loss
        loss.backward()

    def clear(self) -> None:
        """Set all gradients to None."""
        for parameter in self.model.parameters():
            parameter.grad = None


def count(row: str, mode: str) -> Figures:
    """Python calls and operations of a step.

    Args:
        row: Key of `ROWS`.
        mode: Key of `MODES`.
    """
    with _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = Step(row, mode)
        return {"calls": _count_calls(step), "ops": _count_ops(step)}


def seconds(row: str, mode: str, steps: int) -> list[float]:
    """Processor time of each of `steps` consecutive steps."""
    found = []
    with _one_thread():
        step = Step(row, mode)
        for _ in range(steps):
            step.clear()
            begin = time.process_time()
            step()
            found.append(time.process_time() - begin)
    return found


def _count_calls(step: Step) -> int:
    found = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal found
        found += event == "call"

    step.clear()
    before = sys.getprofile()
    gc.disable()  # finalizers would be counted
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
        gc.enable()
    return found


def _count_ops(step: Step) -> int:
    step.clear()
    with _Operations() as operations:
        step()
    return operations.found


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        is_view = function.is_view or function is torch.ops.aten._unsafe_view.default
        self.found += not is_view and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output))
        return output


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(rows: list[str], parts: list[str], rounds: int, steps: int) -> dict[str, dict[str, Figures | str]]:
    """Row -> mode -> figures, or the reason why there are none.

    Args:
        rows: Keys of `ROWS`.
        parts: `"counts"`, `"time"`, or both.
        rounds: Processes per row, for `"time"`.
        steps: Steps per process.
    """
    found: dict[str, dict[str, Figures | str]] = {row: {} for row in rows}
    for row in rows:
        for mode in MODES:
            try:
                counts = {} if row.endswith(COMPILED) else count(row, mode)
                found[row][mode] = counts if "counts" in parts else {}
            except ConfigError as error:
                found[row][mode] = " ".join(str(error).split())
    if "time" in parts:
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for row in rows:
                modes = [mode for mode, figures in found[row].items() if isinstance(figures, dict)]
                for mode, values in in_own_process(__file__, "--worker", row, *modes, "--steps", steps).items():
                    taken.setdefault((row, mode), []).extend(values)
        for (row, mode), values in taken.items():
            figures = found[row][mode]
            assert isinstance(figures, dict)
            figures |= {"host": 1000 * min(values), "host, median": 1000 * statistics.median(values)}
    return found


def table(found: dict[str, dict[str, Figures | str]], mode: str) -> str:
    """Markdown table: each figure and its ratio to full fine-tuning; for low-rank updates also to PEFT's LoRA."""
    full, lora = (found[base][mode] for base in BASES.values())
    assert isinstance(full, dict) and isinstance(lora, dict)
    units = {"host": "host, ms", "host, median": "median, ms"}
    heads = [f"{units.get(name, name)} | to full | to LoRA" for name in full]
    lines = [f"| {mode} | {' | '.join(heads)} |", "|---|" + "---|" * 3 * len(full)]
    left_out = []
    for row, modes in found.items():
        figures = modes[mode]
        if isinstance(figures, str):
            left_out.append(f"{ROWS[row][0]}: not in {mode}. {figures}")
            continue
        cells = [ROWS[row][0]]
        for name in full:
            if name not in figures:
                cells += [""] * 3
                continue
            value, low_rank = figures[name], row in ("lora", "low-rank")
            cells.append(f"{value:.2f}" if "host" in name else f"{value:.0f}")
            cells.append(_verdict(value / full[name], BARS.get((row, mode, name, "full"))))
            cells.append(_verdict(value / lora[name], BARS.get((row, mode, name, "lora"))) if low_rank else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *left_out]).rstrip()


def _verdict(value: float, bar: float | None) -> str:
    return f"{value:.2f}" + ("" if bar is None else f" (bar {bar:g}: {'met' if value <= bar else 'MISSED'})")


def conditions() -> str:
    """Machine and versions of this measurement."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    return f"CPU, 1 thread, batch 2, {versions}, Python {platform.python_version()}"


def main() -> None:
    """Print a table for each mode, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chosen", nargs="*", help=f"counts, time (default both); rows, of {list(ROWS)} (default all)")
    parser.add_argument("--rounds", type=int, default=2, help="processes per row in `time` (default 2)")
    parser.add_argument("--steps", type=int, default=50, help="steps per process (default 50)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if args.worker:
        row, *modes = args.worker
        print(json.dumps({mode: seconds(row, mode, args.steps) for mode in modes}))
        return
    if unknown := sorted(set(args.chosen) - {"counts", "time", *ROWS}):
        parser.error(f"unknown: {unknown}. Use counts, time, or rows of {list(ROWS)}")
    parts = [part for part in ("counts", "time") if part in args.chosen] or ["counts", "time"]
    asked = [row for row in ROWS if row in args.chosen] or list(ROWS)
    rows = [row for row in ROWS if row in asked or row in BASES.values()]
    found = measure(rows, parts, args.rounds, args.steps)
    if args.json:
        print(json.dumps({"conditions": conditions(), "rows": found}, indent=2))
    else:
        print("\n\n".join([conditions(), *(table(found, mode) for mode in MODES)]))


if __name__ == "__main__":
    main()
