"""Several labels an image, and regression, from a table to predictions; what is reported is of the saved adapter."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import peft_bsr
from peft_bsr.cli.prediction_table import PredictionTable
from peft_bsr.prediction import to_prediction
from peft_bsr_cli import main

KINDS = {
    "multilabel": ("multi_label_classification", ["blue", "green", "red"], ["f1_micro", "f1_macro", "mAP"]),
    "regression": ("regression", ["light"], ["mae", "rmse", "r2"]),
}


@pytest.fixture(scope="session")
def tables(tmp_path_factory) -> Path:
    """Thirty images whose channels are on or off, and two tables: which ones, and how light the image is."""
    folder = tmp_path_factory.mktemp("tables")
    generator = np.random.default_rng(0)
    rows = []
    for index in range(30):
        channels = generator.integers(0, 2, 3)
        pixels = generator.integers(0, 60, (16, 16, 3)) + channels * 180
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        named = [name for name, is_on in zip(("red", "green", "blue"), channels, strict=True) if is_on]
        rows.append((f"{index}.png", "|".join(named), 1000 + 10 * float(pixels.mean())))
    for name, column, header in (("multilabel", 1, "tags"), ("regression", 2, "light")):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file_name", header), *((row[0], row[column]) for row in rows)])
    return folder


@pytest.fixture(scope="session", params=KINDS)
def fitted(request, base, tables, tmp_path_factory) -> tuple[str, Path, str]:
    """The kind, what a run of it wrote, and its table."""
    output, table = tmp_path_factory.mktemp("fitted"), str(tables / f"{request.param}.csv")
    command = ["train", "--model", str(base), "--dataset", table, "--output", str(output), "--keep", "best"]
    command += ["--epochs", "4", "--batch-size", "8", "--learning-rate", "3e-3", "--no-measuring", "--json"]
    assert main(command) == 0
    return request.param, output, table


def checked(fitted: tuple[str, Path, str], said: dict) -> None:
    """What `evaluate` said of the test images is on the card and in the summary."""
    kind, output, _ = fitted
    card = ModelCard.load(output / "adapter" / "README.md").text
    summary = json.loads((output / "summary.json").read_text())["scores"]["test"]
    for name in KINDS[kind][2]:
        assert said[name] == pytest.approx(summary[name], rel=1e-6)
        assert f"- test {name.replace('_', ' ')} on {kind}.csv: {said[name]:.4g}\n" in card
    assert said["loss"] == pytest.approx(summary["loss"], rel=1e-5)


def asked(fitted: tuple[str, Path, str]) -> list[str]:
    return ["evaluate", str(fitted[1] / "adapter"), "--dataset", fitted[2], "--split", "test", "--json"]


def test_the_reported_figures_are_those_of_the_saved_adapter(fitted, capsys):
    capsys.readouterr()
    assert main(asked(fitted)) == 0
    said = json.loads(capsys.readouterr().out)
    checked(fitted, said)
    problem_type, labels, _ = KINDS[fitted[0]]
    model = peft_bsr.load(fitted[1] / "adapter")
    assert (model.config.problem_type, list(model.config.id2label.values())) == (problem_type, labels)
    if fitted[0] == "regression":
        assert 1000 < model(**_pixels(fitted)).logits.mean() < 4000, "values as they are, not scaled"
        assert said["rmse"] == pytest.approx(said["loss"] ** 0.5, rel=1e-4)
        assert said["r2"] > 0, "no better than the mean of the training values"


@pytest.mark.slow  # imports
def test_in_a_fresh_process_too(fitted):
    command = [sys.executable, "-m", "peft_bsr.cli", *asked(fitted)]
    checked(fitted, json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def predicted(fitted: tuple[str, Path, str], model: Path, run_json) -> list[dict]:
    files = [Path(fitted[2]).with_name(f"{index}.png") for index in range(8)]
    flags = ["--threshold", "0.4"] if fitted[0] == "multilabel" else []
    return run_json("predict", *files, "--model", model, *flags)["predictions"]


def test_predictions(fitted, run_json):
    kind, output, _ = fitted
    one = predicted(fitted, output / "adapter", run_json)[0]
    outputs = peft_bsr.load(output / "adapter").eval()(**_pixels(fitted)).logits[0]
    if kind == "regression":
        assert one["values"] == pytest.approx(outputs.tolist(), rel=1e-4)
    else:
        chances = {name: p for name, p in zip(KINDS[kind][1], outputs.sigmoid().tolist(), strict=True) if p >= 0.4}
        assert dict(zip(one["labels"], one["probabilities"], strict=True)) == pytest.approx(chances, rel=1e-4)


def test_all_probabilities_stand_beside_the_predicted_labels():
    predictor = SimpleNamespace(problem_type="multi_label_classification", labels=["cat", "dog", "fox"])
    one = to_prediction(predictor, "a.jpg", torch.tensor([0.0, 2.0, -2.0]), top_k=None)
    chances = {"probability_cat": "0.5", "probability_dog": "0.880797", "probability_fox": "0.119203"}
    for threshold, label, probability in ((0.4, "dog|cat", "0.880797|0.5"), (0.6, "dog", "0.880797"), (0.9, "", "")):
        table = PredictionTable(predictor, None, threshold)
        row = dict(zip(table.header, table.row(one), strict=True))
        assert row == {"file": "a.jpg", "label": label, "probability": probability, **chances}


def test_the_threshold_goes_with_all_probabilities(fitted, run, tables, tmp_path):
    command = ["predict", tables / "0.png", "--model", fitted[1] / "adapter", "--all", "--threshold"]
    for threshold, count in (("0", 3), ("1", 0)):
        code, out, _ = run(*command, threshold, "--output", tmp_path / f"{threshold}.csv")
        assert code == (0 if fitted[0] == "multilabel" else 2)
        if code == 0:
            (row,) = csv.DictReader((tmp_path / f"{threshold}.csv").read_text().splitlines())
            assert len([name for name in row["label"].split("|") if name]) == count
            assert sum(f"{name} 1" in " ".join(out.split()) for name in KINDS["multilabel"][1]) == count


@pytest.mark.slow  # exports
def test_predictions_and_figures_of_the_onnx_file(fitted, run_json, tmp_path):
    kind, output, _ = fitted
    run_json("export", output / "adapter", "--output", tmp_path / "m.onnx", "--no-check")
    models = (output / "adapter", tmp_path / "m.onnx")
    for one, other in zip(*(predicted(fitted, model, run_json) for model in models), strict=True):
        assert one["labels"] == other["labels"]
        key = "probabilities" if kind == "multilabel" else "values"
        assert one.get(key, []) == pytest.approx(other.get(key, []), rel=1e-3)  # patches alike may change their order
    first, second = (run_json("evaluate", model, *asked(fitted)[2:-1]) for model in models)
    for name in KINDS[kind][2]:
        assert first[name] == pytest.approx(second[name], rel=1e-3)


def test_report_and_pictures(fitted, run_json, tables, tmp_path):
    kind, output, _ = fitted
    page = (output / "report.html").read_text()
    assert f"test {KINDS[kind][2][0]}" in page
    picture = tmp_path / "kept.png"
    seen = run_json("show", tables / "0.png", "--model", output / "adapter", "--output", picture)["images"][0]
    (value,) = run_json("predict", tables / "0.png", "--model", output / "adapter")["predictions"]
    expected = f"{value['values'][0]:.6g}" if kind == "regression" else "|".join(value["labels"])
    assert seen["label"] == expected


REFUSED = ["--class-weights balanced", "--label-smoothing 0.1", "--augment strong"]


@pytest.mark.parametrize("flag", REFUSED)
def test_what_is_for_classes_is_refused_before_images_are_read(flag, run, base, tables, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_bsr.cli.images.check_images", None)
    command = ["train", "--model", base, "--output", tmp_path / "new", *flag.split()]
    for data in ([tables / "regression.csv"], ["nowhere", "--task", "regression"]):
        code, _, err = run(*command, "--dataset", *data)
        assert code == 2
        assert "is for classes, but the labels are values (regression)" in err.splitlines()[-1]
        assert not (tmp_path / "new").exists()


def test_several_labels_take_weights_smoothing_and_mixing(run_json, base, tables, tmp_path):
    command = ["train", "--model", base, "--dataset", tables / "multilabel.csv", "--output", tmp_path]
    command += ["--max-steps", "1", "--batch-size", "8", "--no-measuring", "--validation-size", "0"]
    flags = "--class-weights balanced --label-smoothing 0.1 --augment strong --method linear"
    assert list(run_json(*command, *flags.split())["scores"]["test"])[:3] == KINDS["multilabel"][2]


@pytest.mark.slow  # trains twice
def test_values_train_from_a_cache(run_json, base, tables, tmp_path):
    command = ["train", "--model", base, "--dataset", tables / "regression.csv", "--batch-size", "8", "--epochs", "1"]
    command += ["--no-measuring", "--set", "trainable_blocks=last:1", "--set", "reduction_blocks=[]"]
    plain, cached = (
        run_json(*command, "--output", tmp_path / name, *flags)["scores"]
        for name, flags in (("plain", []), ("cached", ["--cache"]))
    )
    for split in ("validation", "test"):
        assert cached[split]["mae"] == pytest.approx(plain[split]["mae"], rel=1e-2)


def _pixels(fitted: tuple[str, Path, str]) -> dict:
    processor = peft_bsr.load_image_processor(fitted[1] / "adapter")
    image = Image.open(Path(fitted[2]).with_name("0.png"))
    return dict(processor(image, return_tensors="pt"))
