"""Every command on a tiny model: what it says to people, to machines, and what it writes."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import peft_bsr
from peft_bsr.exporting import ExportReport


def test_inspect_a_model(run, run_json, base):
    said = run_json("inspect", base)
    assert (said["family"], said["blocks"], said["tokens"]) == ("vit", 4, "17: 1 special, 16 patches")
    assert said["methods"] == {"bsr": None, "alast": None, "losa": None, "synqt": None}
    code, out, _ = run("inspect", base)
    assert code == 0
    assert "17: 1 special, 16 patches" in out


def test_inspect_says_why_no_token_can_be_dropped(run, tmp_path):
    from transformers import SwinConfig

    SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[1, 2], window_size=4).save_pretrained(tmp_path)
    code, out, _ = run("inspect", tmp_path)
    assert code == 0
    assert "none: block 0 maps (1, 64, 16) to (1, 16, 32)" in " ".join(out.split())
    assert "Use `keep_rate=1.0`" in " ".join(out.split())


def test_inspect_the_vision_model_inside_a_larger_one(run, run_json, tmp_path):
    from transformers import SmolVLMConfig

    vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vision |= {"image_size": 32, "patch_size": 8}
    text = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 9, "num_attention_heads": 2}
    config = SmolVLMConfig(vision_config=vision, text_config=text | {"intermediate_size": 32}, image_token_id=5)
    config.architectures = ["SmolVLMForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    said = run_json("inspect", tmp_path)
    assert said["part"] == "model.vision_model, a SmolVLMVisionTransformer"
    assert (said["blocks"], said["tokens"]) == (3, "16: 0 special, 16 patches")
    assert said["methods"]["bsr"] is None and "`part='model.vision_model'`" in said["methods"]["synqt"]
    code, _, error = run("inspect", tmp_path, "--part", "model.vision_modle")
    assert code != 0
    assert "has no module of that name. Near names: `model.vision_model`" in " ".join(error.split())


def test_inspect_an_adapter(run_json, trained):
    said = run_json("inspect", trained / "adapter")
    assert said["adapter"]["method"] == "bsr"
    assert said["adapter"]["labels"] == ["dark", "light"]
    assert any("blocks 2 and 3 train" in sentence for sentence in said["adapter"]["plan"])


def test_plan(run_json, base):
    said = run_json("plan", base, "--memory", "10MB", "--batch-size", "2", "--limit", "1")
    (plan,) = said["plans"]
    assert plan["method"] == "full"
    assert 0 < plan["peak_bytes"] < 10e6
    rest = "--method full --learning-rate 0.0003 --batch-size 2 --trainer optim=adamw_torch_fused --dataset DATA"
    assert plan["command"] == f"peft-bsr train --model {base} {rest}", "not on the digits unless they are asked for"


def test_plan_by_what_the_blocks_contribute(run, run_json, base, images, tmp_path):
    file = tmp_path / "found.json"
    asked = ["plan", base, "--memory", "1GB", "--batch-size", "8", "--contributions", file]
    code, _, said = run(*asked)
    assert code == 2 and "Pass `--data` to measure and write it" in said
    first = run_json(*asked, "--data", images)["plans"]
    assert all(plan.pop("command").endswith(f" --dataset {images}") for plan in first)
    kept = file.read_text()
    assert len(json.loads(kept)["whole"]) == 4
    assert {plan["options"].get("trainable", "full") for plan in first} == {"full", "lora"}
    assert all(plan["contribution_share"] == 1 for plan in first), "everything fits"
    again = run_json(*asked, "--labels", "2")["plans"]
    assert all(plan.pop("command").endswith(" --dataset DATA") for plan in again)
    assert again == first and file.read_text() == kept


def test_plan_says_what_it_declines(run, run_json, base):
    asked = ["plan", base, "--memory", "10MB", "--batch-size", "2", "--limit", "3", "--precision", "bf16"]
    asked += ["--image-size", "32", "--optimizer", "adamw_8bit"]
    plans = run_json(*asked)["plans"]
    assert plans[1]["declined"] == ["frozen weights in bfloat16: every block trains"]
    assert "--image-size 32 --precision bf16 --trainer optim=adamw_torch" in plans[1]["command"]
    assert "declined: frozen weights in bfloat16: every block trains" in run(*asked)[1]


def test_the_command_of_a_plan_trains_what_was_planned():
    import argparse

    import torch
    from transformers import TrainingArguments

    from peft_bsr.cli import train
    from peft_bsr.cli.plan import command_of
    from peft_bsr.cli.settings import read_settings
    from peft_bsr.cli.sources import make_config
    from peft_bsr.cost import BudgetPlan, Setup

    config = peft_bsr.BSRConfig(trainable_blocks="last:3", reduction_blocks=[], lean="max")
    setup = Setup(8, 384, "adamw_8bit", device="cuda", autocast=torch.bfloat16, gradient_checkpointing="offload")
    typed = shlex.split(command_of(BudgetPlan(config, setup, None, ""), "some/model", ["--dataset", "a folder"]))
    assert typed[:2] == ["peft-bsr", "train"]
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    settings = read_settings(parser.parse_args(typed[2:]))
    assert make_config("bsr", settings.options) == config
    assert (settings.model, settings.dataset) == ("some/model", "a folder")
    assert (settings.batch_size, settings.image_size) == (8, 384)
    assert (settings.learning_rate, settings.precision) == (1e-3, "bf16")
    assert settings.trainer == {
        "optim": "adamw_torch_8bit",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False, "offload": True},
    }
    assert set(settings.trainer) <= set(TrainingArguments.__dataclass_fields__)


def test_train_writes_all_it_says(trained, base, images):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["accuracy"] <= 1
    assert set(summary["costs"]) == {"full fine-tuning", "BSR"}
    assert yaml.safe_load((trained / "settings.yaml").read_text())["options"] == {"trainable_blocks": "last:2"}
    card = ModelCard.load(trained / "adapter" / "README.md")
    assert f"- test accuracy on {images.name}: {summary['accuracy']:.4g}" in card.text
    assert "| BSR |" in card.text
    assert (trained / "adapter" / "kept_tokens.png").exists()
    page = (trained / "report.html").read_text()
    assert "What trains" in page
    assert "Kept tokens" in page
    assert f"--model {base}" in page


def test_results_people_read(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["kept_step"], summary["kept_epoch"]) == (2, 0.5)
    assert summary["peak_memory"]["predicted_bytes"] > 0
    scores = json.loads((trained / "scores.json").read_text())
    for split, figures in summary["scores"].items():
        assert figures.items() <= scores[split].items()
    classes = scores["test"]["classes"]
    worst = scores["test"]["worst"]
    assert [one["loss"] for one in worst] == sorted((one["loss"] for one in worst), reverse=True)
    assert all(one["file"].endswith(f"{one['label']}/{Path(one['file']).name}") for one in worst)
    with Image.open(trained / "confusion.png") as picture:
        assert picture.width > 100
    page = (trained / "report.html").read_text()
    for heading in ("Results on 4 test images", "Confusion matrix", "Images with the highest loss", "Peak memory"):
        assert f"<h2>{heading}</h2>" in page
    assert "learning rate by optimizer step" in page
    assert "<dt>kept</dt><dd>epoch 0.5 of 0.5 (step 2 of 2)</dd>" in page
    assert f"file: {Path(worst[0]['file']).name}\nlabel: {worst[0]['label']}" in page
    card = (trained / "adapter" / "README.md").read_text()
    dark = classes["dark"]
    assert f"| dark | {dark['precision']:.3f} | {dark['recall']:.3f} | {dark['f1']:.3f} | 2 |" in card


def test_a_run_goes_on(run, run_json, trained, base, images, tmp_path):
    settings = yaml.safe_load((trained / "settings.yaml").read_text())
    settings |= {"output": str(tmp_path / "run"), "epochs": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    first = ["train", "--config", tmp_path / "run.yaml", "--no-measuring"]
    assert run_json(*first)["steps"] == 2
    code, _, err = run(*first)
    assert code == 2
    assert "has checkpoints. Pass `--resume`" in err
    resumed = run_json(*first, "--resume", "--max-steps", "3")
    assert resumed["steps"] == 3
    assert resumed["costs"] == {}
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("checkpoint-3/trainer_state.json")).read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [2, 3]


@pytest.mark.parametrize("method", ["alast", "losa", "synqt"])
def test_train_by_the_other_methods(method, run_json, base, images, tmp_path):
    command = ["train", "--model", base, "--dataset", images, "--method", method, "--output", tmp_path]
    said = run_json(*command, "--max-steps", "1", "--batch-size", "4", "--no-measuring")
    assert said["method"] == method
    page = (tmp_path / "report.html").read_text()
    assert ("<h2>Budgets</h2>" in page) == (method == "alast")
    assert "<h2>Kept tokens</h2>" not in page, "in use they keep every token"
    assert peft_bsr.load(tmp_path / "adapter").config.id2label == {0: "dark", 1: "light"}


def test_evaluate(run, run_json, trained, images):
    said = run_json("evaluate", trained / "adapter", "--dataset", images, "--split", "test")
    summary = json.loads((trained / "summary.json").read_text())
    assert (said["split"], said["images"]) == ("test", 4)
    assert said["accuracy"] == summary["accuracy"] == summary["scores"]["test"]["accuracy"]
    assert said["loss"] == pytest.approx(summary["loss"], abs=1e-5)
    assert set(said["classes"]) == set(said["labels"]) == {"dark", "light"}
    assert sum(map(sum, said["confusion"])) == 4
    assert sum(said["confusion"][i][i] for i in range(2)) == 4 * said["accuracy"]
    (scored,) = (one for split, one in json.loads((trained / "scores.json").read_text()).items() if split == "test")
    assert {name: said[name] for name in ("classes", "labels", "confusion")}.items() <= scored.items()
    assert [one["file"] for one in said["worst"]] == [one["file"] for one in scored["worst"]]
    code, out, err = run("evaluate", trained / "adapter", "--dataset", images)
    assert code == 0
    assert "all 20 images are scored. If the model was trained on this dataset, most of them are its training" in err
    assert "images             20" in out and "loss               0." in out
    code, _, err = run("evaluate", trained / "adapter")
    assert code == 2
    assert "the model does not know 10 of the 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9. " in err


def test_show(run_json, trained, images, tmp_path):
    picture = tmp_path / "pictures" / "kept.png"
    image = images / "dark" / "0.png"
    said = run_json("show", image, "--model", trained / "adapter", "--output", picture)
    assert said["images"][0]["label"] in ("dark", "light")
    first, second, third = (round(16 * share) for share in said["kept"].values())
    assert (first, second) == (8, 4)
    assert third in (1, 2), "the fused token may be one of the two that stay"
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height


def test_the_picture_is_where_it_is_said_to_be(run_json, trained, images, tmp_path):
    picture = tmp_path / "kept"
    said = run_json("show", images / "dark" / "0.png", "--model", trained / "adapter", "--output", picture)
    assert said["picture"] == str(picture)
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"


def test_compare(run_json, base):
    arguments = ["--methods", "full", "lora", "bsr", "--batch-size", "2", "--repeats", "1"]
    said = run_json("compare", base, *arguments, "--set", "trainable_blocks=last:1")
    costs = said["costs"]
    assert list(costs) == ["full fine-tuning", "LoRA r=8, every Linear", "bsr"]
    assert costs["bsr"]["saved_bytes_per_image"] < costs["full fine-tuning"]["saved_bytes_per_image"]
    assert "batch 2, 32 x 32 px" in said["conditions"]


def test_compare_trains_on_a_data_set(run, base, images, tmp_path):
    command = ["compare", base, "--dataset", images, "--methods", "linear", "bsr", "--set", "trainable_blocks=last:1"]
    command += ["--batch-size", "4", "--repeats", "1", "--validation-size", "6", "--output", tmp_path / "a" / "b.json"]
    code, out, err = run(*command, "--epochs", "2", "--images", "6")
    assert code == 0, err
    assert "train: 6 of 10 images are selected at random" in err
    assert "bsr, 2 of 2: 4 steps" in err
    assert "accuracy: on 6 validation images after a short run" in " ".join(out.split())
    assert "train_runtime" not in out
    said = json.loads((tmp_path / "a" / "b.json").read_text())
    assert said["images"] == {"train": 6, "validation": 6}
    assert list(said["results"]) == list(said["costs"]) == ["linear probe", "bsr"]
    for name, rate in (("linear probe", 1e-2), ("bsr", 1e-3)):
        result = said["results"][name]
        assert (result["steps"], result["epochs"], result["learning_rate"]) == (4, 2, rate)
        assert result["accuracy"] in [right / 6 for right in range(7)]
        assert result["peak_memory"]["predicted_bytes"] > 0
    code, _, err = run(*command)
    assert (code, err) == (2, f"peft-bsr: `{tmp_path / 'a' / 'b.json'}` exists. Give another file.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "1"], "`--epochs` is for use with `--dataset`."),
        (["--labels", "3", "--dataset", "{images}"], "`--labels` is for use without `--dataset`."),
        (["--seconds", "0", "--dataset", "{images}"], "`--seconds 0` must be above 0."),
        (["--dataset", "{images}", "--validation-size", "0"], "has no validation images."),
        (["--set", "trainable=most"], "trainable"),
    ],
)
def test_compare_refuses_before_it_measures(arguments, message, run, base, images):
    code, _, err = run("compare", base, *(argument.format(images=images) for argument in arguments))
    assert code == 2
    assert message in err.splitlines()[-1]


def test_a_time_bounds_the_steps():
    from peft_bsr.cli.settings import TrainSettings
    from peft_bsr.cli.trial import bounded

    settings = TrainSettings("model", epochs=3, batch_size=32)
    assert bounded(settings, 100, 60, 0.1).max_steps == 12
    assert bounded(settings, 100, 60, 10).max_steps == 6
    assert bounded(settings, 100, 60, 100).max_steps == 1


def test_export_hands_over_what_was_asked(run_json, trained, tmp_path, monkeypatch):
    asked = {}

    def export(model, format, path, **settings):
        asked.update(settings, model=model, format=format, path=path)
        measured = {"max_difference": 0.0, "batch_size": 8, "threads": 2, "seconds": 0.1, "unreduced_seconds": 0.2}
        return ExportReport(format, path, 1, None, "pixel_values", (None, 3, 32, 32), [(17, 10)], {}, **measured)

    monkeypatch.setattr(importlib.import_module("peft_bsr.cli.export"), "export", export)
    said = run_json("export", trained / "adapter", "--output", tmp_path / "model.onnx", "--quantize", "int8")
    assert (said["max_difference"], said["speedup"]) == (0.0, 2.0)
    assert asked["image_size"] == (32, 32), "what the adapter was trained at"
    assert (asked["format"], asked["quantize"], asked["check"], asked["batch_size"]) == ("onnx", "int8", True, None)
    assert asked["model"].peft_config["default"].labels == ["dark", "light"]
