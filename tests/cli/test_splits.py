"""Validation for epochs, test once; what is reported is of the very weights that were saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peft_bsr_cli import main

BEST = ["load_best_model_at_end=true", "metric_for_best_model=loss", "greater_is_better=true", "save_total_limit=2"]


@pytest.fixture(scope="session")
def best(base, images, tmp_path_factory) -> Path:
    """A run of 3 epochs whose "best" one is forced to be the worst, which is not the last."""
    output = tmp_path_factory.mktemp("best")
    command = ["train", "--model", str(base), "--dataset", str(images), "--output", str(output), "--epochs", "3"]
    command += ["--batch-size", "4", "--learning-rate", "1e-2", "--validation-size", "6", "--no-measuring", "--json"]
    assert main([*command, *(word for setting in BEST for word in ("--trainer", setting))]) == 0
    return output


def checked(output: Path, said: dict[str, dict]) -> None:
    """What `evaluate` said of each split is what the run reported, and not what its last epoch had."""
    summary = json.loads((output / "summary.json").read_text())
    card = ModelCard.load(output / "adapter" / "README.md")
    results = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    for split in ("validation", "test"):
        assert said[split]["accuracy"] == summary["scores"][split]["accuracy"]
        assert said[split]["loss"] == pytest.approx(summary["scores"][split]["loss"], abs=1e-6)
        assert f"- {split} accuracy on " in card.text
        assert f": {said[split]['accuracy']:.4g}" in card.text
        for name in ("accuracy", "balanced_accuracy"):
            assert results[split, name] == said[split][name]
    state = json.loads(max(output.glob("checkpoints/*/trainer_state.json")).read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert losses[0] > losses[-1] + 1e-3, "the last epoch is not the one that was kept"
    assert summary["scores"]["validation"]["loss"] == pytest.approx(max(losses), abs=1e-5)


def asked(output: Path, images: Path, split: str) -> list[str]:
    command = ["evaluate", str(output / "adapter"), "--dataset", str(images), "--split", split]
    return [*command, *(["--validation-size", "6"] if split == "validation" else []), "--json"]


def test_the_reported_scores_are_those_of_the_saved_adapter(best, images, capsys):
    said = {}
    for split in ("validation", "test"):
        capsys.readouterr()
        assert main(asked(best, images, split)) == 0
        said[split] = json.loads(capsys.readouterr().out)
    checked(best, said)


@pytest.mark.slow  # imports twice
def test_in_a_fresh_process_too(best, images):
    said = {}
    for split in ("validation", "test"):
        command = [sys.executable, "-m", "peft_bsr.cli", *asked(best, images, split)]
        said[split] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    checked(best, said)


def test_without_validation_images_epochs_are_not_scored(run, run_json, base, images, tmp_path):
    command = [
        "train",
        "--model",
        base,
        "--dataset",
        images,
        "--epochs",
        "1",
        "--no-measuring",
        "--validation-size",
        "0",
    ]
    said = run_json(*command, "--output", tmp_path / "a")
    assert list(said["scores"]) == ["test"]
    code, _, err = run(*command, "--output", tmp_path / "b", *(word for s in BEST for word in ("--trainer", s)))
    assert (code, err.splitlines()[-1]) == (
        2,
        "peft-bsr: `load_best_model_at_end` needs validation images. Give more images, or `--validation-size`.",
    )


def test_what_is_in_the_data_is_said(run, base, images, tmp_path):
    command = ["train", "--model", base, "--dataset", images, "--max-steps", "1", "--no-measuring"]
    code, _, err = run(*command, "--output", tmp_path)
    assert code == 0
    said = " ".join(err.split())
    assert "2 classes: dark (7), light (7)" in said
    assert "test: 4 of the 20 training images are held out, by class" in said
    assert "14 train, 2 validation, 4 test images; 32 x 32 px, 17 tokens" in said
    page = (tmp_path / "report.html").read_text()
    assert "validation accuracy" in page
    assert "test accuracy" in page


def test_bad_files_stop_a_run_before_it_begins_or_are_left_out(run, run_json, base, tmp_path, images):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    for name in ("dark/3.png", "light/4.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    command = ["train", "--model", base, "--dataset", folder, "--output", tmp_path / "out", "--max-steps", "1"]
    code, _, err = run(*command, "--no-measuring")
    assert code == 2
    assert "dark/3.png" in err.splitlines()[-1]
    assert "light/4.png" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert run_json(*command, "--no-measuring", "--skip-bad")["steps"] == 1


def test_a_model_without_a_processor_is_trained_and_it_is_said(run, run_json, base, images, tmp_path):
    shutil.copytree(base, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    command = ["train", "--model", tmp_path / "bare", "--dataset", images, "--max-steps", "1", "--no-measuring"]
    code, _, err = run(*command, "--output", tmp_path / "a")
    assert code == 0
    assert "has no image processor. The default of its model type is used" in " ".join(err.split())
    processor = json.loads((tmp_path / "a" / "adapter" / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["size"]) == ([0.5] * 3, {"height": 32, "width": 32})


def test_check(run, run_json, images):
    said = run_json("check", images)
    assert said["counts"] == {"train": {"dark": 10, "light": 10}}
    assert (said["modes"], said["widths"]) == ({"RGB": 20}, [36, 36, 36])
    code, out, _ = run("check", images)
    assert code == 0
    assert "36 to 36, median 36" in out


def test_show_of_a_folder(run, run_json, trained, images, tmp_path):
    picture = tmp_path / "kept.png"
    said = run_json("show", images, "--model", trained / "adapter", "--output", picture, "--limit", "3")
    assert len(said["images"]) == 3
