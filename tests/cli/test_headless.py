"""A model without a classifier on the command line: it gets one, and one line says so."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel, ViTImageProcessorPil


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dinov3"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "DINOv3ViTImageProcessor"  # which needs torchvision
    settings["image_mean"] = [0.1, 0.2, 0.3]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_it_is_trained_evaluated_and_asked(headless, images, run, run_json, tmp_path):
    output = tmp_path / "out"
    command = ["train", "--model", headless, "--dataset", images, "--output", output, "--max-steps", "2", "--cache"]
    code, _, said = run(*command, "--batch-size", "4", "--set", "trainable_blocks=last:1", "--no-measuring")
    assert code == 0, said
    assert f"{headless} has no head: a new classifier reads the class token and the mean of the patches (as its" in said
    assert "cache: `backbone.rope_embeddings` is random in training, but not with a cache" in said
    adapter = output / "adapter"
    assert json.loads((adapter / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    assert "image-classification" in (adapter / "README.md").read_text()
    scores = json.loads((output / "scores.json").read_text())["test"]
    found = run_json("evaluate", adapter, "--dataset", images, "--split", "test")
    assert found["loss"] == pytest.approx(scores["loss"], abs=1e-5)
    facts = run_json("inspect", adapter)
    assert facts["class"] == "BackboneForImageClassification"
    assert facts["adapter"]["labels"] == ["dark", "light"]
