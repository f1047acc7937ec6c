"""`--image-size` of a model whose positions are of one size: every command takes it, and all agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

from peft_bsr_cli import main


@pytest.fixture(scope="module")
def larger(base, images, tmp_path_factory):
    """`larger("bsr")`: what a short run at twice the model's size wrote."""
    written = {}

    def train(method):
        if method not in written:
            written[method] = output = tmp_path_factory.mktemp(method)
            command = ["train", "--model", base, "--dataset", images, "--output", output, "--method", method]
            command += ["--image-size", "64", "--max-steps", "2", "--batch-size", "4", "--no-measuring", "--json"]
            assert main([str(word) for word in command]) == 0
        return written[method]

    return train


@pytest.mark.slow  # writes an ONNX file
def test_every_command_at_the_size_of_training(run, run_json, base, images, tmp_path):
    pytest.importorskip("onnxruntime")
    output, file = tmp_path / "run", tmp_path / "model.onnx"
    command = ["train", "--model", base, "--dataset", images, "--output", output, "--image-size", "64"]
    assert run(*command, "--max-steps", "2", "--batch-size", "4")[0] == 0
    adapter = output / "adapter"
    summary = json.loads((output / "summary.json").read_text())
    assert "64 x 64 px" in summary["conditions"], "also what it is compared with"
    assert run_json("export", adapter, "--output", file, "--no-check")["input_shape"] == [None, 3, 64, 64]
    scored = [run_json("evaluate", model, "--dataset", images, "--split", "test") for model in (adapter, file)]
    assert [one["accuracy"] for one in scored] == [summary["scores"]["test"]["accuracy"]] * 2
    found = [run_json("predict", images, "--model", model, "--all")["predictions"] for model in (adapter, file)]
    for one, other in zip(*found, strict=True):
        assert (one["file"], one["labels"]) == (other["file"], other["labels"])
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert run_json("show", images / "dark" / "0.png", "--model", adapter, "--output", tmp_path / "seen.png")["kept"]
    plain = tmp_path / "plain"
    assert run_json("merge", adapter, "--output", plain, "--dataset", images)["images"] == 20
    model = AutoModelForImageClassification.from_pretrained(plain)
    assert (model.config.image_size, model.vit.embeddings.position_embeddings.shape[1]) == (64, 65)
    code, _, err = run("predict", images, "--model", file, "--image-size", "48")
    assert code == 2
    assert "takes images of 64 x 64 px only. Export one for that size" in err


def test_another_size_than_that_of_training(run_json, larger, images):
    adapter = larger("bsr") / "adapter"
    at_training, smaller = (
        run_json("predict", images, "--model", adapter, "--all", *words)["predictions"]
        for words in ((), ("--image-size", "48"))
    )
    assert smaller != at_training
    assert run_json("inspect", adapter)["input"] == "3 x 64 x 64"
    right = [one["labels"][0] == Path(one["file"]).parent.name for one in smaller]
    assert run_json("evaluate", adapter, "--dataset", images, "--image-size", "48")["accuracy"] == sum(right) / 20


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_baselines_remember_the_size(method, run_json, larger, images):
    output = larger(method)
    summary = json.loads((output / "summary.json").read_text())
    said = run_json("evaluate", output / ("model" if method == "full" else "adapter"), "--dataset", images)
    assert said["images"] == 20
    assert said["loss"] > 0
    assert summary["steps"] == 2


def test_plan_and_compare(run, run_json, base, tmp_path):
    small, large = (
        run_json("plan", base, "--memory", "100MB", "--limit", "1", *words)["plans"][0]
        for words in ((), ("--image-size", "64"))
    )
    assert large["training_flops"] > 2 * small["training_flops"]
    assert "--image-size 64" in large["command"]
    said = run_json("compare", base, "--methods", "bsr", "--image-size", "64", "--batch-size", "2", "--repeats", "1")
    assert "64 x 64 px" in said["conditions"]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=64)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}})
    )
    plan = run_json("plan", tmp_path, "--memory", "100MB", "--limit", "1")["plans"][0]
    assert "--image-size 32" in plan["command"], "what train takes by itself, not what the configuration says"
    assert "32 x 32 px" in run_json("compare", tmp_path, "--methods", "full", "--repeats", "1")["conditions"]


def test_tokens_are_counted_at_the_size_of_training(run, images, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "patch_size": 8}
    Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=256)).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 256, "width": 256}})
    )
    command = ["train", "--model", tmp_path / "base", "--dataset", images, "--output", tmp_path / "out"]
    command += ["--image-size", "64", "--max-steps", "1", "--batch-size", "4", "--no-measuring"]
    code, _, err = run(*command)
    assert code == 0, err
    said, page = (" ".join(text.split()) for text in (err, (tmp_path / "out" / "report.html").read_text()))
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "64 x 64 px, 65 tokens" in said
    for text in (said, page, card):  # the probe runs at 128 px
        assert "at 64 x 64 px, 65 tokens become" in text


@pytest.mark.parametrize("command", ["train", "plan", "compare", "evaluate", "predict", "export", "show", "merge"])
def test_a_size_that_cannot_be_ends_with_one_line(command, run, base, trained, images, tmp_path):
    adapter, new = trained / "adapter", tmp_path / "new"
    words = {
        "train": ["--model", base, "--dataset", "nowhere", "--output", new],
        "plan": [base, "--memory", "1GB"],
        "compare": [base],
        "evaluate": [adapter, "--dataset", "nowhere"],
        "predict": [images, "--model", adapter],
        "export": [adapter, "--output", new],
        "show": [images, "--model", adapter, "--output", new],
        "merge": [adapter, "--output", new],
    }
    code, _, err = run(command, *words[command], "--image-size", "50")
    assert code == 2
    assert "`image_size=50`: ViTForImageClassification cuts images into patches of 8 px" in err.splitlines()[-1]
    assert "Use 48 or 56." in err
    assert not new.exists()
