"""Adapters that an earlier commit saved (e6178df; `logits.json` is what it computed) load, and give equal outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import ViTConfig, ViTForImageClassification

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "saved_before").glob("*/adapter_config.json"))
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}


def test_there_is_one_of_each_method():
    assert {folder.name.partition("-")[0] for folder in FOLDERS} == {"bsr", "alast", "synqt"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_adapter_of_an_earlier_commit_gives_equal_outputs(folder):
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(ViTForImageClassification(ViTConfig(**SIZES)), str(folder)).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    task = {"task": "a"} if folder.name == "bsr-tasks" else {}
    with torch.no_grad():
        logits = model(pixel_values=images, **task).logits
    torch.testing.assert_close(logits, torch.tensor(json.loads((folder / "logits.json").read_text())))
