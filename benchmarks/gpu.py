"""Training steps on a GPU: images per second, milliseconds and memory of every method, eager and compiled.

    python benchmarks/gpu.py                        # eight minutes of one card; run it again to continue
    python benchmarks/gpu.py --list                 # the rows, the most important first, with estimated times
    python benchmarks/gpu.py --only "BSR" "full"    # rows with one of these texts in their names
    python benchmarks/gpu.py --guess                # add the planner's prediction to each peak, on any machine
    python benchmarks/gpu.py --table                # the figures as Markdown
    python benchmarks/gpu.py --device cpu --size tiny --results /tmp/tiny.json

Random weights and images, created on the device; bf16 autocast over fp32 weights. A step is forward, backward and
AdamW's update. Each row runs in a new process, forked from one that has imported everything and never initialized the
device, so no memory and no compiled code of an earlier row is left (inductor's cache on disk is used). Measured:

- step: CUDA events from the end of one step to the end of the next, median of 8 to 30 after 3 warm-up steps, and range.
- host: time until Python returns from a step that starts on an idle device, median of 8. CUDA queues about a thousand
  kernels; in a longer step Python waits, and this is the device's time.
- warm-up: time of the first 3 steps minus that of 3 later ones. In a compiled row this is the compile time, which the
  step time does not contain; a row says if anything was compiled while it was timed.
- kept: bytes alive between forward and backward, per image.
- peak: allocated and reserved above what stays between steps (weights, optimizer state), over two steps, including the
  batch and cuBLAS's workspace.

Offloaded checkpointing is transformers' own, `gradient_checkpointing_enable(..., offload=True)`. Budgets are torch's
`activation_memory_budget`. The largest batch is predicted by the planner, then corrected until it fills `--memory`.
A row that fails or does not fit is stored with the reason, and the others run; one that runs out of time is not stored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from forked import Forks
from gpu_rows import MODELS, ROWS, Row
from gpu_step import environment, guess, measure, short

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
MEMORY = {"full": "24GiB", "tiny": "64MiB"}
PATIENCE = 4  # a row has failed after so many times its estimated time
HEADS = {  # column -> key of the figure
    "images/s": "images_per_s",
    "step, ms": "step_ms",
    "range": "step_ms_range",
    "host, ms": "host_ms",
    "kept": "kept_mib_per_image",
    "peak": "peak_allocated_mib",
    "reserved": "peak_reserved_mib",
    "guess": "guess_mib",
    "warm-up, s": "warm_up_s",
}

Results = dict[str, dict[str, Any]]


def main() -> None:
    """Measure what is missing, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="do not start rows that would take longer (default 8)")
    parser.add_argument("--memory", help="memory for the largest batch (default 24GiB)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default {RESULTS.relative_to(ROOT)}")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="rows with one of these texts in the name"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    parser.add_argument("--size", choices=tuple(MODELS), default="full", help="default full; tiny for a test")
    parser.add_argument("--commit", help="commit hash, if git is not available (default: from git)")
    parser.add_argument("--again", action="store_true", help="measure rows that failed again")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--guess", action="store_true", help="add the planner's predictions and stop; needs no GPU")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown and stop")
    args = parser.parse_args()
    rows = [row for row in ROWS if any(text in row.name for text in args.only)]
    if not rows:
        parser.error(f"no row has any of {args.only} in its name; --list shows the names")
    results = read(args.results)
    if args.list:
        print("\n".join(f"{row.seconds:4.0f} s  {row.name}" for row in rows))
    elif args.guess:
        add_guesses(results, args.results)
    elif args.table:
        print(table(results))
    else:
        memory = args.memory or MEMORY[args.size]
        run(rows, results, args.results, args.size, args.device, memory, 60 * args.minutes, args.commit, args.again)


def run(
    rows: list[Row],
    results: Results,
    path: Path,
    size: str,
    device: str,
    memory: str,
    seconds: float,
    commit: str | None,
    again: bool,
) -> None:
    """Measure the rows that `results` lacks, in order, while time is left; the file is written after each row."""
    begin = time.monotonic()
    forks = Forks("gpu_step")
    try:
        where = forks.call(environment, device, timeout=120)
    except EOFError:
        sys.exit(f"`--device {device}` cannot be used, see above. To test this program: `--device cpu --size tiny`.")
    where |= {"commit": commit or _commit(), "size": size, "device": device, "memory": memory}
    place = "; ".join(filter(None, (where["card"], f"torch {where['torch']}", where["commit"], size, memory)))
    results["environments"][place] = where
    found = results["rows"].setdefault(place, {})
    todo = [row for row in rows if row.name not in found or (again and found[row.name]["status"] == "failed")]
    print(f"{place}: {len(todo)} of {len(rows)} rows to measure", flush=True)
    left_out = []
    for row in todo:
        left = begin + seconds - time.monotonic()
        if row.seconds > left:
            left_out.append(row)
            continue
        limit = PATIENCE * row.seconds if device == "cuda" else left
        try:
            figures = forks.call(measure, row, size, device, memory, timeout=min(left, limit))
        except TimeoutError:
            if left <= limit:  # out of time: not the row's fault
                left_out.append(row)
                continue
            figures = {"status": "failed", "error": f"not done after {limit:.0f} s"}
        except EOFError as error:
            figures = {"status": "failed", "error": str(error)}
        found[row.name] = figures
        write(results, path)
        print(f"{row.name}: {_line(figures)}", flush=True)
    if left_out:
        need = sum(row.seconds for row in left_out) / 60
        print(f"{len(left_out)} rows are left, about {need:.0f} minutes: run this again.")


def add_guesses(results: Results, path: Path) -> None:
    """Add the planner's prediction to each measured peak that has none yet."""
    rows = {row.name: row for row in ROWS}
    for place, found in results["rows"].items():
        where = results["environments"][place]
        for name, figures in found.items():
            if figures["status"] != "measured" or "guess_mib" in figures or name not in rows:
                continue
            sizes = MODELS[where["size"]][rows[name].model]
            try:
                guessed = guess(rows[name], sizes, figures["batch"], where["device"])
            except Exception as error:  # keep the measured figures
                figures |= {"guess_mib": None, "guess_error": short(error)}
            else:
                above = guessed.total_bytes - guessed.weights_bytes - guessed.optimizer_bytes
                figures["guess_mib"] = round(above / 2**20, 2)
            write(results, path)


def table(results: Results) -> str:
    """A Markdown table for each environment and model; below it the rows that were not measured, and why."""
    parts = []
    for place, found in results["rows"].items():
        where = results["environments"][place]
        versions = ", ".join(f"{name} {where[name]}" for name in ("driver", "torch", "transformers", "peft", "commit"))
        parts.append(f"{where['card']}, {versions}; largest batch: {where['memory']}.")
        for model in MODELS[where["size"]]:
            rows = [row for row in ROWS if row.model == model and row.name in found]
            if rows:
                parts.append("\n".join(_rows(f"{model} {where['size']}".removesuffix(" full"), rows, found)))
    return "\n\n".join(parts)


def _rows(title: str, rows: list[Row], found: Results) -> list[str]:
    lines = [f"| {title} | {' | '.join(HEADS)} |", "|---|" + "---|" * len(HEADS)]
    notes = []
    for row in rows:
        figures = found[row.name]
        if figures["status"] != "measured":
            notes.append(f"- {row.label}: {figures['error']}")
        if figures["status"] == "failed":
            continue
        batch = f" ({figures['batch']})" if row.batch is None and "batch" in figures else ""
        cells = [_cell(figures.get(figure)) for figure in HEADS.values()]
        if figures["status"] == "out of memory":
            cells[0] = "out of memory"
        if figures.get("compiled_while_timed"):
            notes.append(f"- {row.label}: recompiled while it was timed.")
        lines.append(f"| {row.label}{batch} | {' | '.join(cells)} |")
    return [*lines, "", *notes] if notes else lines


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return " to ".join(f"{number:.4g}" for number in (value if isinstance(value, list) else [value]))


def _line(figures: dict[str, Any]) -> str:
    if figures["status"] != "measured":
        return f"{figures['status']}, {figures['error']}"
    return ", ".join(f"{head} {_cell(figures.get(figure))}" for head, figure in HEADS.items() if figure in figures)


def read(path: Path) -> Results:
    """The results in a file; empty if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else {"environments": {}, "rows": {}}


def write(results: Results, path: Path) -> None:
    """Replace the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)


def _commit() -> str:
    """The last commit that changed the measured code, with `+` if files have changed since."""
    measured = ["peft_bsr", "benchmarks/*.py"]
    try:
        commit = _git("log", "-1", "--format=%h", "--", *measured)
        return commit + ("+" if _git("diff", "--name-only", "HEAD", "--", *measured) else "")
    except (OSError, subprocess.CalledProcessError):
        sys.exit("git cannot tell the commit. Pass --commit HASH")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
