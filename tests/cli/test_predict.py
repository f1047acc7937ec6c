"""`predict`, `evaluate` and `merge` on one adapter, its ONNX files and its merged folder."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import peft_bsr
from peft_bsr import BSRConfig
from peft_bsr.cli.output import Output


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks that tell dark from light by chance, the first drops half of the patches; with its processor."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    labels = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    base = ViTForImageClassification(ViTConfig(**sizes, **labels, image_size=32, patch_size=8, initializer_range=0.3))
    base.save_pretrained(folder / "base")
    config = BSRConfig(trainable_blocks=[1], reduction_blocks=[0], keep_rate=0.5)
    get_peft_model(ViTForImageClassification.from_pretrained(folder / "base"), config).save_pretrained(folder / "bsr")
    ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3).save_pretrained(folder / "bsr")
    return folder / "bsr"


@pytest.fixture(scope="session")
def onnx_file(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter as a file, in a folder of its own. Written once: it takes seconds."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    report = peft_bsr.export(peft_bsr.load(adapter), "onnx", path, check=False)
    assert report.image_processor == f"saved with the adapter: {adapter}"
    return path


@pytest.fixture
def photos(images: Path, tmp_path: Path) -> Path:
    """Four images of two folders, and two files that are no images."""
    folder = tmp_path / "photos"
    for name in ("dark/0", "dark/1", "light/0", "light/1"):
        (folder / "2024" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / f"{name}.png", folder / "2024" / f"{name}.png")
    (folder / "broken.png").write_bytes((images / "dark" / "2.png").read_bytes()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_to_csv(run, adapter, photos, tmp_path):
    output = tmp_path / "made" / "pred.csv"
    code, out, err = run("predict", photos, "--model", adapter, "--output", output)
    assert code == 0
    rows = read(output)
    assert list(rows[0]) == ["file", "label", "probability"]
    assert [Path(row["file"]).relative_to(photos / "2024") for row in rows] == [
        Path("dark/0.png"),
        Path("dark/1.png"),
        Path("light/0.png"),
        Path("light/1.png"),
    ]
    assert {row["label"] for row in rows} <= {"dark", "light"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    err = " ".join(err.split())
    assert "2 of 6 images cannot be read and are left out" in err
    assert "broken.png: cannot be decoded" in err
    assert "empty.jpg: is not an image" in err
    assert "4 images" in out
    assert sorted(path.name for path in output.parent.iterdir()) == ["pred.csv"], "no draft is left"


def test_probabilities_are_those_of_the_model(run_json, adapter, photos, images):
    model, processor = peft_bsr.load(adapter), AutoImageProcessor.from_pretrained(adapter)
    image = Image.open(images / "light" / "0.png")
    with torch.no_grad():
        expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    said = run_json("predict", photos, "--model", adapter, "--all", "--batch-size", "3")
    found = next(one for one in said["predictions"] if one["file"].endswith("light/0.png"))
    assert dict(zip(found["labels"], found["probabilities"], strict=True)) == pytest.approx(
        {"dark": float(expected[0]), "light": float(expected[1])}, abs=1e-6
    )
    assert [Path(one["file"]).name for one in said["skipped"]] == ["broken.png", "empty.jpg"]


def test_a_column_is_named_as_its_class(capsys):
    Output(is_json=False, is_debug=False).table("", ["probability_[/x]"], [["1"]])
    assert "probability_[/x]" in capsys.readouterr().out


def test_top_k_and_all(run, adapter, images, tmp_path):
    image = images / "dark" / "0.png"
    assert run("predict", image, "--model", adapter, "--top-k", "5", "--output", tmp_path / "k.csv")[0] == 0
    (row,) = read(tmp_path / "k.csv")
    assert list(row) == ["file", "label", "probability", "label_2", "probability_2"]
    assert float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1, abs=1e-5)
    assert run("predict", image, "--model", adapter, "--all", "--output", tmp_path / "all.csv")[0] == 0
    (full,) = read(tmp_path / "all.csv")
    assert list(full) == ["file", "label", "probability", "probability_dark", "probability_light"]
    assert full[f"probability_{full['label']}"] == full["probability"] == row["probability"]


def test_a_file_is_not_lost(run, adapter, photos, images, tmp_path):
    output = tmp_path / "pred.csv"
    output.write_text("mine")
    command = ["predict", images / "dark", "--model", adapter, "--output", output]
    code, _, err = run(*command)
    assert (code, output.read_text()) == (2, "mine")
    assert "`--overwrite`" in err
    code, _, err = run("predict", photos / "empty.jpg", *command[2:], "--overwrite")
    assert (code, output.read_text()) == (2, "mine"), "nothing could be read"
    assert "1 of 1 images cannot be read" in err
    assert run(*command, "--overwrite")[0] == 0
    assert len(read(output)) == 10
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["pred.csv"]


def test_a_table_with_paths(run_json, adapter, photos, tmp_path):
    table = photos / "2024" / "list.csv"
    table.write_text("path,note\ndark/0.png,a\nnowhere.png,b\nlight/1.png,c\n")
    said = run_json("predict", table, "--model", adapter)
    assert [Path(one["file"]).name for one in said["predictions"]] == ["0.png", "1.png"]
    assert said["skipped"][0]["reason"].startswith("there is no file")


def test_a_table_of_bytes_without_names(run_json, adapter, images, tmp_path):
    encoded = [(images / name / "0.png").read_bytes() for name in ("dark", "light")]
    Dataset.from_dict({"picture": encoded}).to_parquet(tmp_path / "images.parquet")
    said = run_json("predict", tmp_path / "images.parquet", "--model", adapter, "--workers", "1")
    assert [one["file"] for one in said["predictions"]] == ["row 0", "row 1"]
    by_name = run_json("predict", images / "dark" / "0.png", images / "light" / "0.png", "--model", adapter)
    assert [one["probabilities"] for one in by_name["predictions"]] == [
        one["probabilities"] for one in said["predictions"]
    ]


def test_adapter_and_onnx_file_agree(run_json, adapter, onnx_file, photos):
    by_adapter = run_json("predict", photos, "--model", adapter, "--all")
    by_file = run_json("predict", photos, "--model", onnx_file, "--all")
    assert by_file["skipped"] == by_adapter["skipped"]
    for one, other in zip(by_adapter["predictions"], by_file["predictions"], strict=True):
        assert (one["file"], one["labels"]) == (other["file"], other["labels"])
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


@pytest.mark.parametrize("kind", ["adapter", "onnx"])
def test_accuracy_is_that_of_the_predicted_labels(run_json, adapter, onnx_file, images, kind):
    model = adapter if kind == "adapter" else onnx_file
    said = run_json("evaluate", model, "--dataset", images)
    predictions = run_json("predict", images, "--model", model)["predictions"]
    right = [one["labels"][0] == Path(one["file"]).parent.name for one in predictions]
    assert said["images"] == len(right) == 20
    assert said["accuracy"] == sum(right) / 20


def test_the_file_describes_itself(adapter, onnx_file):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(onnx_file)
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["labels"]) == ["dark", "light"]
    assert json.loads(said["image_size"]) == [32, 32]
    assert json.loads(said["image_mean"]) == json.loads(said["image_std"]) == [0.5, 0.5, 0.5]
    assert (said["resample"], said["problem_type"]) == ("bicubic", "single_label_classification")
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert session.get_outputs()[0].shape == ["batch", 2]


def test_int8_keeps_what_the_file_says(run_json, onnx_file, images, tmp_path):
    from peft_bsr.exporting.formats import quantize_onnx

    quantize_onnx(onnx_file, tmp_path / "int8.onnx")
    said = [run_json("evaluate", file, "--dataset", images) for file in (onnx_file, tmp_path / "int8.onnx")]
    assert abs(said[0]["accuracy"] - said[1]["accuracy"]) <= 0.1
    assert 0 < abs(said[0]["loss"] - said[1]["loss"]) < 0.1


@pytest.mark.slow
def test_a_quantised_file_of_one_batch_size(run_json, adapter, images, tmp_path):
    path = tmp_path / "int8.onnx"
    peft_bsr.export(peft_bsr.load(adapter), "onnx", path, quantize="int8", batch_size=3, check=False)
    said, own = (run_json("evaluate", model, "--dataset", images) for model in (path, adapter))
    assert said["images"] == 20
    assert said["loss"] == pytest.approx(own["loss"], abs=0.1)


def test_a_file_that_does_not_describe_itself(run, onnx_file, images, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    labels = next(one.value for one in model.metadata_props if one.key == "labels")
    for known, message in (({}, "its classes and its images"), ({"labels": labels}, "its images")):
        onnx.helper.set_model_props(model, known)
        onnx.save(model, tmp_path / "bare.onnx")
        code, _, err = run("evaluate", tmp_path / "bare.onnx", "--dataset", images)
        assert code == 2
        assert f"does not describe {message}. Write it again" in err


def test_merge(run, run_json, adapter, images, tmp_path):
    folder = tmp_path / "new" / "plain"
    code, out, err = run("merge", adapter, "--output", folder, "--dataset", images)
    assert code == 0
    assert "merged, all tokens" in out
    assert "It runs on all tokens" in err
    plain = AutoModelForImageClassification.from_pretrained(folder)
    assert type(plain) is ViTForImageClassification
    assert plain.config.id2label == {0: "dark", 1: "light"}
    assert AutoImageProcessor.from_pretrained(folder).size == {"height": 32, "width": 32}
    assert [path.name for path in folder.parent.iterdir()] == ["plain"]
    said = run_json("merge", adapter, "--output", tmp_path / "again", "--dataset", images)
    assert (said["reduces"], said["images"]) == (True, 20)
    assert said["accuracy"]["adapter"] == run_json("evaluate", adapter, "--dataset", images)["accuracy"]
    assert said["accuracy"]["merged"] == run_json("evaluate", folder, "--dataset", images)["accuracy"]
    code, _, err = run("merge", adapter, "--output", folder)
    assert code == 2
    assert "exists and is not empty" in err


@pytest.mark.parametrize("kept_in", ["int8", "bfloat16"])
def test_merged_weights_are_the_rounded_ones_in_one_dtype(run, adapter, images, tmp_path, kept_in):
    model = ViTForImageClassification.from_pretrained(adapter.parent / "base")
    model = get_peft_model(model, BSRConfig(trainable_blocks=[1], reduction_blocks=[], frozen_weights=kept_in)).eval()
    model.save_pretrained(tmp_path / "rounded")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "rounded")
    assert run("merge", tmp_path / "rounded", "--output", tmp_path / "plain")[0] == 0
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=kept_in == "bfloat16"):
        torch.testing.assert_close(plain(pixels).logits, model(pixels).logits, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{images}", "--model", "{adapter}", "--threshold", "0.5"], "several labels per image"),
        (["{images}", "--model", "{adapter}", "--top-k", "0"], "`--top-k 0` must be at least 1"),
        (["{images}", "--model", "{adapter}", "--top-k", "1", "--all"], "not allowed with"),
        (["{images}", "--model", "{adapter}", "--workers", "-1"], "`--workers -1` must be at least 0"),
        (["{images}", "--model", "nowhere.onnx"], "There is no file `nowhere.onnx`"),
        (["{images}", "--model", "{images}"], "neither a model nor an adapter"),
        (["nowhere.jpg", "--model", "{adapter}"], "there is no file `nowhere.jpg`"),
        (["{images}", "--model", "{adapter}", "--device", "warp"], "torch cannot use this device here"),
    ],
)
def test_refusals(run, adapter, images, arguments, message):
    named = [word.format(images=images, adapter=adapter) for word in arguments]
    code, out, err = run("predict", *named)
    assert (code, out) == (2, "")
    assert message in err
