"""The example of several tasks on a tiny model: whole, killed and resumed, and on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTImageProcessorPil

EXAMPLE = Path(__file__).parents[2] / "examples" / "multitask_moe.py"


@pytest.fixture
def run(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil().save_pretrained(tmp_path / "model")

    def start(output: str, *arguments: str, launcher: tuple[str, ...] = ()) -> dict[str, float]:
        command = [sys.executable, *launcher, str(EXAMPLE), "--model", str(tmp_path / "model"), "--output"]
        command += [
            str(tmp_path / output),
            "--batch-size",
            "4",
            "--train-images",
            "16",
            "--test-images",
            "8",
            *arguments,
        ]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads((tmp_path / output / "results.json").read_text())

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_that_stops_goes_on_bit_for_bit(run, tmp_path):
    settings = ("--epochs", "1", "--experts", "3", "--gradient-accumulation", "2", "--mixed-precision", "bf16")
    whole = run("whole", *settings)
    assert set(whole) == {"digits", "odd", "ink"}
    run("parts", *settings, "--max-updates", "3")
    assert run("parts", *settings) == whole
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(1, 7))


@pytest.mark.dist
def test_two_processes(run):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29613")
    results = run("two", "--epochs", "1", "--experts", "3", "--expert-type", "lora", launcher=launcher)
    assert set(results) == {"digits", "odd", "ink"}
