from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import ViTImageProcessorPil

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("keep_rate", ["0.5", pytest.param("1.0", marks=pytest.mark.slow)])
def test_the_whole_demo_on_a_tiny_model(keep_rate, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil().save_pretrained(tmp_path / "model")
    output = tmp_path / "output"
    arguments = [
        "--model",
        str(tmp_path / "model"),
        "--max-steps",
        "2",
        "--keep-rate",
        keep_rate,
        "--output",
        str(output),
    ]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    summary = (output / "summary.md").read_text()
    assert "| full fine-tuning |" in summary
    assert "| BSR |" in summary
    assert "same logits, bit for bit" in summary
    assert {"adapter_model.safetensors", "preprocessor_config.json"} <= {p.name for p in (output / "adapter").iterdir()}
    assert (output / "kept_tokens.png").exists() == (keep_rate == "0.5")


def test_a_dataset_without_images_is_named(make_model, tmp_path):
    import pandas

    pandas.DataFrame({"text": ["a"], "label": [0]}).to_parquet(tmp_path / "text.parquet")
    result = run("--dataset", str(tmp_path / "text.parquet"))
    assert result.returncode == 1
    assert "none of them holds images. Choose one with `--image-column`" in result.stderr
