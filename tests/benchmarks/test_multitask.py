"""The benchmark of three tasks: a small one runs to a table, and what is there is not made again."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """The module, on a tiny model and a few images."""
    for folder in (FOLDER / "method_comparison", FOLDER):
        monkeypatch.syspath_prepend(str(folder))
    import multitask

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    for split in ("train", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
        images = Dataset.from_dict({"image": list(pixels), "label": [0, 1] * 12}, features=features)
        images.to_parquet(tmp_path / f"noise-{split}-24.parquet")
    small = {"train_images": 8, "validation_images": 4, "test_images": 10, "epochs": 1, "batch_size": 4}
    protocol = dataclasses.replace(multitask.PROTOCOL, tasks=["noise", "digits"], sweep_train_images=4, **small)
    monkeypatch.setattr(multitask, "PROTOCOL", protocol)
    arguments = ["--model", tmp_path / "model", "--data", tmp_path, "--results", tmp_path / "results"]

    def run(what: str, *more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["multitask.py", what, *map(str, arguments), *more])
        multitask.main()

    return run


def test_a_small_one_runs_to_tables(benchmark, tmp_path, capsys):
    from multitask_report import BEGIN, END, write_report

    benchmark("run", "--only", "dense", "moe", "--keep-rates", "0.5")
    benchmark("try", "--only", "moe", "--keep-rates", "1", "--learning-rates", "1e-3")
    found = sorted(path.relative_to(tmp_path / "results") for path in (tmp_path / "results").rglob("*.json"))
    assert [str(path.parent) for path in found] == [
        "test/dense--keep0.5--0.001",
        "test/moe--keep0.5--0.001",
        "validation/moe--keep1--0.001",
    ]
    dense, moe, tried = (json.loads((tmp_path / "results" / path).read_text()) for path in found)
    assert set(moe["accuracy"]) == {"noise", "digits"} and moe["train_images"] == 8 and tried["train_images"] == 4
    assert moe["trained_parameters"] > dense["trained_parameters"]
    capsys.readouterr()
    benchmark("run", "--only", "dense", "moe", "--keep-rates", "0.5")
    assert capsys.readouterr().out == ""
    for task, accuracy in (("noise", 0.5), ("digits", 0.9)):
        single = {
            "run_info": {"train_config": {"learning_rate": 3e-4}},
            "train_info": {"num_trainable_params": 10**6, "metrics": [{"accuracy": accuracy}]},
        }
        path = tmp_path / "results" / "single" / task / "seed-0.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(single))
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}old\n{END}below\n")
    write_report(tmp_path / "results", tmp_path / "none", ["noise", "digits"], page)
    text = page.read_text()
    assert "| 2 full fine-tunes | 0.0003 | 1 | 50.0 | 90.0 | 70.0 | 2.00 |" in text
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert text.count("| mixtures of experts, keep") == 2 and "dense multitask, keep 0.5" in text


def test_digits_are_split_without_overlap():
    sys.path.insert(0, str(FOLDER / "method_comparison"))
    try:
        from data import Protocol, load_task
    finally:
        sys.path.pop(0)
    protocol = Protocol.load("multitask")
    parts = load_task("digits", protocol, None)
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes == {"train": 1000, "validation": 250, "test": 500}
    pictures = [np.asarray(image).tobytes() for part in parts.values() for image in part["image"]]
    assert len(set(pictures)) == len(pictures) == 1750
