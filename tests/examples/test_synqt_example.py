from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTImageProcessorPil

EXAMPLE = Path(__file__).parents[2] / "examples" / "synqt.py"


@pytest.mark.slow
def test_the_example_on_a_tiny_model(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil().save_pretrained(tmp_path / "model")
    command = [sys.executable, str(EXAMPLE), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    command += ["--epochs", "0.1", "--keep-rate", "0.5", "--num-queries", "2"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    assert "MiB per image for backward" in result.stdout and "epochs from the cache" in result.stdout
    assert "Feature cache: 1438 samples of" in result.stderr
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
