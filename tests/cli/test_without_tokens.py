"""A model in which no token can be dropped (Swin) goes through the commands like any other."""

from __future__ import annotations

import shlex

import torch
from transformers import SwinConfig, SwinForImageClassification, ViTImageProcessorPil

SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}


def test_from_a_plan_to_predictions(run, run_json, images, tmp_path):
    model, output = tmp_path / "swin", tmp_path / "run"
    torch.manual_seed(0)
    SwinForImageClassification(SwinConfig(**SWIN)).save_pretrained(model)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(model)
    plans = run_json("plan", model, "--memory", "1GB", "--batch-size", "4")["plans"]
    assert len(plans) > 5 and not any(plan["recommended"] for plan in plans)
    words = shlex.split(next(plan["command"] for plan in plans if "lora" in plan["command"]))
    code, _, err = run(*words[1:], "--dataset", images, "--output", output, "--max-steps", "1")
    assert code == 0, err
    assert "32 x 32 px\n" in err and "No tokens are dropped." in err
    card = (output / "adapter" / "README.md").read_text()
    assert "No tokens are dropped." in card and "runs on all tokens" not in card
    assert run_json("evaluate", output / "adapter", "--dataset", images)["images"] == 20
    assert len(run_json("predict", images, "--model", output / "adapter")["predictions"]) == 20
    assert run_json("merge", output / "adapter", "--output", tmp_path / "merged", "--dataset", images)["images"] == 20
