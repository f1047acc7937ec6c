"""Runs `train.py` in new processes and stores the results; a run that has a result is not repeated."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the folder of results."""
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of results (default: ours)")


def results_of(args: argparse.Namespace) -> Path:
    """The folder of the protocol's results, or of those within so many seconds."""
    seconds = getattr(args, "seconds", None)
    folder = args.results / Path(args.protocol).stem
    return folder if seconds is None else folder / f"{seconds:g}-seconds"


def add_experiments(parser: argparse.ArgumentParser) -> None:
    """Add the argument that selects experiments."""
    parser.add_argument("--only", nargs="*", help="these experiments (default: all but those of try.py)")


def stored(path: Path) -> dict[str, Any]:
    """What a JSON file of results holds; nothing if there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def add_launching(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how long runs take and how they share the machine."""
    parser.add_argument("--seconds", type=float, help="train so long instead of the protocol's epochs")
    parser.add_argument("--at-once", type=int, default=default_at_once(), help="parallel runs (default: by cores)")
    parser.add_argument("--threads", type=int, default=0, help="threads per run (default: cores / parallel runs)")


def default_at_once() -> int:
    """1 with a GPU, else one per core, up to 4: a run uses a core better than another thread does."""
    return 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)


def launch(args: argparse.Namespace, result: Path, experiment: str, **settings: Any) -> dict[str, Any] | None:
    """The result of a run, read from its file or run now.

    Args:
        args: Arguments of `add_sources` and `add_launching`.
        result: File of the result.
        experiment: Folder below `experiments/`.
        settings: Further arguments of `train.py`, such as `learning_rate=1e-3`; True = a flag without a value.

    Returns:
        What `train.py` printed, or None if it failed; the reason is then in `*.failed.txt` next to `result`.
    """
    if result.exists():
        return json.loads(result.read_text())
    threads = args.threads or max(1, (os.cpu_count() or 1) // args.at_once)
    settings |= {"protocol": args.protocol, "model": args.model, "threads": threads}
    if getattr(args, "seconds", None) is not None:
        settings["seconds"] = args.seconds
    if args.data is not None:
        settings["data"] = args.data
    command = [sys.executable, str(HERE / "train.py"), experiment]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
    )
    result.parent.mkdir(parents=True, exist_ok=True)
    failed = result.with_suffix(".failed.txt")
    if done.returncode:
        failed.write_text(f"{' '.join(command)}\n\n{done.stderr}")
        return None
    failed.unlink(missing_ok=True)
    found = json.loads(done.stdout.splitlines()[-1])
    unfinished = result.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=2) + "\n")
    unfinished.replace(result)
    return found
