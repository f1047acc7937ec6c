"""The short examples run as they are, in this process (imports take longest), on a tiny model and digits."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run("trainer", "--epochs", "1")` -> what it printed; it writes to `tmp_path / "out"`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4))
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    verbosity = transformers.logging.get_verbosity()

    def start(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield start
    transformers.logging.set_verbosity(verbosity)
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


def test_trainer_goes_on_where_it_stopped(run, tmp_path):
    settings = ("--model", "model", "--batch-size", "64", "--output", "out")
    assert "test accuracy 0." in run("trainer", *settings, "--epochs", "1", "--max-steps", "2")
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2" / "trainer_state.json").exists()
    printed = run("trainer", *settings, "--epochs", "1", "--max-steps", "4", "--resume")
    assert "trainable params" in printed
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-4").exists()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "adapter" / "preprocessor_config.json").exists()


def test_accelerate_loop(run, tmp_path):
    printed = run("accelerate_loop", "--model", "model", "--max-steps", "3", "--output", "out")
    assert "epoch 1, step 3: loss 2." in printed
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "adapter" / "preprocessor_config.json").exists()


def test_alast(run, tmp_path):
    printed = run("alast", "--model", "model", "--max-steps", "3", "--output", "out")
    assert "ViTForImageClassification without adapter saved" in printed
    assert (tmp_path / "out" / "budgets.png").exists()
    plain = ViTForImageClassification.from_pretrained(tmp_path / "out" / "model")
    assert plain.config.num_labels == 10


def test_plan_for_budget(run):
    printed = run("plan_for_budget", "--model", "model", "--memory", "3MB", "--batch-size", "8")
    assert "Full fine-tuning, batch 8:" in printed
    assert "plans fit into 3MB; the first gives up least" in printed


@pytest.mark.slow
def test_export_onnx(run, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    printed = run("export_onnx", "--model", "model", "--output", "out")
    assert "pixel_values [any, 3, 16, 16], 17 tokens into the first block" in printed
    assert "x faster" in printed
    assert "preprocessing: in the file, the given one" in printed
    assert "accuracy of the file on 100 test images: 0." in printed


@pytest.mark.slow
def test_the_cells_of_the_notebook(run, tmp_path):
    pytest.importorskip("onnxruntime")
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    assert codes[0]["metadata"]["tags"] == ["parameters"]
    assert not any(cell["outputs"] for cell in codes), "committed without outputs"
    names = {"__name__": "notebook"}
    exec("".join(codes[0]["source"]), names)
    names |= {"MODEL": "model", "EPOCHS": 0.02, "OUTPUT": "out"}
    for cell in codes[1:]:
        exec("".join(cell["source"]), names)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"memory.png", "kept_tokens.png", "attention.png", "adapter", "model.onnx"} <= written
