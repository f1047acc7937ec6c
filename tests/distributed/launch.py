"""Starts processes that train, the way users do: with torchrun, or with accelerate launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no")


def launch(
    script: str,
    *arguments: Any,
    processes: int,
    with_accelerate: bool = False,
    options: tuple[str, ...] = (),
    fails: bool = False,
) -> str:
    """Run a script of this folder on several processes, and wait.

    Args:
        script: Its file name.
        arguments: For the script; all but text as JSON.
        processes: How many, with gloo on the CPU.
        with_accelerate: `accelerate launch` instead of `torchrun`.
        options: Of the launcher.
        fails: Whether it is to fail.

    Returns:
        What it wrote to the standard error.
    """
    launcher = (*ACCELERATE, "--num_processes") if with_accelerate else (*TORCHRUN, "--nproc-per-node")
    words = [a if isinstance(a, str) else str(a) if isinstance(a, Path) else json.dumps(a) for a in arguments]
    path = Path(__file__).parent / script
    command = [sys.executable, *launcher, str(processes), *options, str(path), *words]
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "PYTHONPATH": python_path,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else restarted processes may read addresses of dead ones
    }
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1800)
    assert (result.returncode != 0) == fails, result.stderr[-6000:]
    return result.stderr
