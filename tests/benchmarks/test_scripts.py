"""The benchmarks that pages quote run, on small settings; what they measure is not looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "bsr_vit_base.py --batch-size 1 --repeats 1",
    "lean.py saved gradients --batch-size 1",
    "planner.py --only ViT-Ti --batch-size 2",
    "alast.py --batch-size 1 --draws 1",
    "synqt.py --batch-size 1 --rounds 1",
    "experts.py layer --batch 1 --repeats 1",
    "export.py --formats torch.export --num-images 2",
    "host.py stock --rounds 1 --steps 2",
    "quantized.py --batch-size 1 --repeats 1 --autocast",
    "sam.py --pixels 256",
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition(".")[0])
def test_a_benchmark_runs(command: str):
    script, *arguments = command.split()
    if script == "quantized.py":
        pytest.importorskip("torchao", reason="torchao is not installed")
    ran = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "torch " in ran.stdout, "the conditions are told"
