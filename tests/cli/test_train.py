"""The flags of `peft-bsr train`: each does what it says, and nothing after training can lose its result."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageClassification

import peft_bsr
from peft_bsr.cli import train
from peft_bsr.cli.output import Output
from peft_bsr.cli.resuming import digest_data
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.training import training_arguments
from peft_bsr.data import load_images, put_aside
from peft_bsr.training import LEARNING_RATES, augmentation, ema, mixup

QUIET = Output(is_json=True, is_debug=False)


@pytest.fixture
def fit(run, base, images, tmp_path):
    """`fit("--ema")`: a short run; its summary, and what was said on stderr."""

    def call(*arguments, code=0, steps=2, output=tmp_path / "run"):
        command = ["train", "--model", base, "--dataset", images, "--output", output, "--batch-size", "4"]
        command += ["--max-steps", steps, "--no-measuring", "--json", *arguments]
        found, out, err = run(*command)
        assert found == code, err
        return json.loads(out) if code == 0 else None, err

    return call


@pytest.mark.parametrize(("method", "saved"), [("lora", "adapter"), ("full", "model"), ("linear", "model")])
def test_baselines_train_on_the_same_images(method, saved, fit, run_json, images, tmp_path):
    summary, err = fit("--method", method)
    assert f"learning rate {LEARNING_RATES[method, None]:.1e} (default of {method})" in err
    assert summary["method"] == method
    assert summary["learning_rate"] == LEARNING_RATES[method, None]
    assert 0 <= summary["scores"]["test"]["accuracy"] <= 1
    folder = tmp_path / "run" / saved
    assert summary[saved] == str(folder)
    assert (folder / "preprocessor_config.json").exists()
    if saved == "model":
        assert AutoModelForImageClassification.from_pretrained(folder).config.id2label == {0: "dark", 1: "light"}
    else:
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    said = run_json("evaluate", folder, "--dataset", images, "--split", "test")
    assert said["accuracy"] == summary["scores"]["test"]["accuracy"]
    assert "parameters train." in (tmp_path / "run" / "report.html").read_text()


def test_everything_at_once(fit, run_json, images, tmp_path, monkeypatch):
    """Flags that have nothing to do with each other go together; each leaves its mark."""
    called = set()

    def seen(name, real):
        def wrapped(*args, **kwargs):
            called.add(name)
            return real(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(augmentation.Augmentation, "__call__", seen("augment", augmentation.Augmentation.__call__))
    monkeypatch.setattr(mixup.MixupDataset, "__getitems__", seen("mixup", mixup.MixupDataset.__getitems__))
    monkeypatch.setattr(ema.TrainedEMA, "update", seen("ema", ema.TrainedEMA.update))
    flags = ["--augment", "strong", "--class-weights", "balanced", "--label-smoothing", "0.1", "--layer-decay", "0.5"]
    flags += ["--ema", "--early-stopping", "2", "--precision", "bf16", "--device", "cpu", "--workers", "0"]
    summary, _ = fit(*flags, "--set", "trainable_blocks=last:2")
    assert called == {"augment", "mixup", "ema"}
    stored = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert (stored["ema"], stored["keep"], stored["precision"]) == (0.999, "best", "bf16")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert (checkpoint / ema.FILE).exists()
    groups = torch.load(checkpoint / "optimizer.pt")["param_groups"]
    assert {group["initial_lr"] for group in groups} == {1e-3, 5e-4, 2.5e-4}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    assert summary["kept_step"] == 2
    said = run_json("evaluate", tmp_path / "run" / "adapter", "--dataset", images, "--split", "test")
    assert said["loss"] == pytest.approx(summary["loss"], abs=1e-6), "not scored in bf16, but as evaluate does"


@pytest.mark.slow
def test_learning_rate_auto_is_said_and_kept(fit, tmp_path):
    summary, err = fit("--learning-rate", "auto", steps=1)
    assert "sweeping learning rates around 1.0e-03: at most five, 20 steps each" in err
    assert f"learning rate {summary['learning_rate']:.1e}, by the loss of" in err
    stored = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert stored["learning_rate"] == pytest.approx(summary["learning_rate"])


@pytest.mark.slow
def test_a_cache_trains_the_same(fit, tmp_path):
    fit("--set", "trainable_blocks=last:1", "--set", "reduction_blocks=[]", output=tmp_path / "plain")
    fit("--set", "trainable_blocks=last:1", "--set", "reduction_blocks=[]", "--cache", output=tmp_path / "cached")
    assert (tmp_path / "cached" / "cache").is_dir()
    plain, cached = (peft_bsr.load(tmp_path / name / "adapter").state_dict() for name in ("plain", "cached"))
    for name, tensor in plain.items():
        assert torch.allclose(tensor, cached[name], atol=2e-3), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "-1"], "`epochs: -1` must be above 0."),
        (["--epochs", "nan"], "`epochs: nan` must be"),
        (["--batch-size", "0"], "`batch_size: 0` must be at least 1."),
        (["--batch-size", "2.5"], "`batch_size: 2.5` must be an integer."),
        (["--learning-rate", "fast"], "`learning_rate: fast` must be a number."),
        (["--learning-rate", "0"], "`learning_rate: 0` must be above 0."),
        (["--max-steps", "0"], "`max_steps: 0` trains nothing."),
        (["--label-smoothing", "1"], "`label_smoothing: 1` must be at least 0 and at most 0.999."),
        (["--layer-decay", "1.5"], "`layer_decay: 1.5` must be above 0 and at most 1."),
        (["--ema", "2"], "`ema: 2` must be"),
        (["--early-stopping", "0"], "`early_stopping: 0` must be at least 1."),
        (["--augment", "heavy"], "`augment: heavy` is unknown. Use one of none, light, strong."),
        (["--precision", "int4"], "`precision: int4` is unknown."),
        (["--class-weights", "heavy"], "must be `balanced`"),
        (["--cache", "--augment", "light"], "it needs `augment: none`"),
        (["--cache", "--method", "alast"], "one of the methods bsr, losa, synqt"),
        (["--early-stopping", "2", "--keep", "last"], "`early_stopping` keeps the best epoch"),
        (["--method", "full", "--set", "r=4"], "`--method full` has no options, but `--set` gives r."),
        (["--method", "lora", "--set", "rr=4"], "unknown option of LoraConfig"),
        (["--trainer", "report_to=tensorboard"], "tensorboard"),
        (["--trainer", "label_smoothing_factor=0.1"], "use the flag `--label-smoothing`"),
        (
            ["--trainer", "eval_strategy=never"],
            "Trainer does not accept these settings: never is not a valid IntervalStrategy",
        ),
        (["--trainer", "logging_steps=often"], "`logging_steps=often` must be a number"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_read(arguments, message, run, base, tmp_path, monkeypatch):
    if "report_to=tensorboard" in arguments:
        from transformers.integrations import integration_utils

        monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    command = ["train", "--model", base, "--dataset", "nowhere", "--output", tmp_path / "new", *arguments]
    code, _, err = run(*command)
    assert code == 2, err
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_devices_and_folders_that_are_not_there(fit, tmp_path):
    if not torch.cuda.is_available():
        assert "torch cannot use this device here" in fit("--device", "cuda", code=2)[1]
        assert "`--precision fp16` needs a GPU" in fit("--precision", "fp16", code=2)[1]
    (tmp_path / "file").write_text("")
    assert "is not a writable folder" in fit(code=2, output=tmp_path / "file" / "below")[1]


@pytest.mark.parametrize("value", ["no", "steps", "epoch"])
def test_fields_of_trainer_are_read_by_their_types(value, tmp_path):
    from peft_bsr.cli.values import Loader, read_pairs

    pairs = read_pairs([f"eval_strategy={value}", f"save_strategy={value}", "weight_decay=1e-2", "tf32=no"])
    from_file = yaml.load(f"eval_strategy: {value}\nsave_strategy: {value}\nweight_decay: 1e-2\ntf32: no", Loader)
    for trainer in (pairs, from_file):
        settings = TrainSettings("model", output=str(tmp_path), trainer={**trainer, "eval_steps": "5"})
        arguments = training_arguments(settings, QUIET)
        assert arguments.eval_strategy == arguments.save_strategy == value
        assert (arguments.weight_decay, arguments.tf32, arguments.eval_steps) == (0.01, False, 5)
        assert arguments.warmup_steps == 0.1


def test_the_best_epoch_is_kept_and_said(fit, run_json, images, tmp_path):
    summary, _ = fit("--keep", "best", "--trainer", "greater_is_better=false", "--learning-rate", "3e-2", steps=9)
    checkpoints = [tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (summary["kept_step"], 9)]
    assert {*checkpoints} <= {*checkpoints[0].parent.iterdir()}, "the best and the last"
    state = json.loads((checkpoints[1] / "trainer_state.json").read_text())
    assert summary["kept_step"] == state["best_global_step"]
    scored = {e["step"]: e["eval_accuracy"] for e in state["log_history"] if "eval_accuracy" in e}
    assert summary["scores"]["validation"]["accuracy"] == pytest.approx(scored[summary["kept_step"]])
    said = run_json("evaluate", tmp_path / "run" / "adapter", "--dataset", images, "--split", "test")
    assert said["accuracy"] == summary["accuracy"]
    assert said["loss"] == pytest.approx(summary["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("metric", "is_better_if_greater"),
    [("accuracy", True), ("mAP", True), ("r2", True), ("eval_loss", False), ("mae", False), ("rmse", False)],
)
def test_the_direction_of_a_metric_is_known(metric, is_better_if_greater, tmp_path):
    def made(keep, **trainer):
        trainer |= {"metric_for_best_model": metric, "load_best_model_at_end": True}
        return training_arguments(TrainSettings("model", output=str(tmp_path), keep=keep, trainer=trainer), QUIET)

    for keep in ("best", "last"):
        found = made(keep)
        assert (found.greater_is_better, found.save_total_limit) == (is_better_if_greater, 2)
        found = made(keep, greater_is_better=not is_better_if_greater, save_total_limit=5)
        assert (found.greater_is_better, found.save_total_limit) == (not is_better_if_greater, 5)


def test_of_several_gpus_one_is_used_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("peft_bsr.cli.training.find_device", lambda asked: asked or "cuda")
    arguments = training_arguments(TrainSettings("model", output=str(tmp_path), batch_size=8), QUIET)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)
    said = capsys.readouterr().err
    assert "one of 2 GPUs is used" in said and "`accelerate launch`" in said
    training_arguments(TrainSettings("model", output=str(tmp_path), device="cpu"), QUIET)
    assert "GPUs" not in capsys.readouterr().err


def test_nothing_after_training_loses_the_adapter(run, base, images, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        is_saved = (tmp_path / "adapter" / "adapter_model.safetensors").exists()
        assert is_saved or isinstance(args[0], TrainSettings), "only the prediction comes before"
        raise RuntimeError("no ink")

    parts = ("predict_peak", "write_scores", "draw_confusion_matrix", "show_worst", "draw_pictures", "measure_costs")
    parts += ("write_adapter_card", "write_report")
    for part in parts:
        monkeypatch.setattr(train, part, fail)
    command = ["train", "--model", base, "--dataset", images, "--output", tmp_path, "--batch-size", "4"]
    code, out, err = run(*command, "--max-steps", "1", "--json")
    assert code == 0, err
    assert "warning: no prediction of peak memory (RuntimeError: no ink). The run continues." in err
    parts = ("scores.json", "confusion matrix", "images with the highest loss", "pictures", "costs", "model card")
    for what in (*parts, "report"):
        assert f"warning: no {what} (RuntimeError: no ink). The trained model is saved." in err
    assert json.loads(out)["scores"] and json.loads(out)["report"] is None
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(out)
    assert peft_bsr.load(tmp_path / "adapter").config.id2label == {0: "dark", 1: "light"}


NAMES = {"$", "$$", "$\\frac{", "a_b^{c}", "薔薇", "été [bold]", "<b>&", "%s {0}"}


def test_class_names_of_any_kind(run, base, tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    command = ["train", "--model", base, "--dataset", tmp_path / "data", "--output", tmp_path / "run"]
    code, _, err = run(*command, "--max-steps", "1", "--batch-size", "4", "--no-measuring")
    assert code == 0, err
    assert "warning" not in err
    assert (tmp_path / "run" / "adapter" / "kept_tokens.png").exists()
    assert (tmp_path / "run" / "confusion.png").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>été [bold]</td>" in page and "<td>&lt;b&gt;&amp;</td>" in page and "<td>薔薇</td>" in page
    assert "| &lt;b&gt;&amp; |" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert set(peft_bsr.load(tmp_path / "run" / "adapter").config.id2label.values()) == NAMES


def test_a_run_that_diverges_says_so(fit, tmp_path):
    _, err = fit("--learning-rate", "1e38", "--trainer", "max_grad_norm=0", code=1, steps=5)
    assert "is not finite" in err and "Lower the learning rate" in err
    (kept,) = (tmp_path / "run").glob("non_finite_step_*.pt")
    assert set(torch.load(kept)) == {"pixel_values", "labels"}
    assert not (tmp_path / "run" / "adapter").exists()


def test_resuming_with_other_settings_changes_nothing(fit, run, tmp_path):
    fit("--set", "trainable_blocks=last:2")
    stored = (tmp_path / "run" / "settings.yaml").read_text()
    _, err = fit("--set", "trainable_blocks=last:1", "--ema", "--resume", code=2, steps=3)
    assert "has other settings" in err and "options: {'trainable_blocks': 'last:2'} there" in err
    assert "ema: None there, 0.999 given" in err
    assert (tmp_path / "run" / "settings.yaml").read_text() == stored

    path = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"]["RunCallback"]["attributes"]["seconds_before"] > 0
    state["stateful_callbacks"]["RunCallback"]["attributes"]["seconds_before"] = 1000.0
    path.write_text(json.dumps(state))
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # killed before the state was written
        (tmp_path / "run" / "checkpoints" / "checkpoint-9").mkdir(exist_ok=True)
        shutil.copy(path.parent / name, tmp_path / "run" / "checkpoints" / "checkpoint-9")
    code, out, err = run(
        "train", "--output", tmp_path / "run", "--resume", "--max-steps", "3", "--no-measuring", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["steps"] == 3
    assert 1000 < json.loads(out)["seconds"] < 1100, "of both pieces"
    assert "<dt>training</dt><dd>100" in (tmp_path / "run" / "report.html").read_text()


def test_resuming_with_other_images_is_refused(run, base, images, tmp_path):
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(images, data)
    command = ["train", "--model", base, "--dataset", data, "--output", output, "--method", "linear"]
    command += ["--batch-size", "4", "--no-measuring", "--resume", "--max-steps"]
    assert run(*(word for word in command if word != "--resume"), "2")[0] == 0
    added = shutil.copy(data / "dark" / "0.png", data / "dark" / "00.png")
    code, _, err = run(*command, "3")
    assert code == 2
    assert f"`{data}` has changed since the run in `{output}` began" in err
    assert re.search(r"train: 14 images, digest \w+ there, 15 images, digest \w+ now", err)
    Path(added).unlink()
    assert run(*command, "3")[0] == 0
    shutil.copy(data / "dark" / "0.png", data / "dark" / "00.png")
    (output / "data.json").unlink()
    assert run(*command, "4")[0] == 0, "a run of before the file existed"


def test_the_digest_of_data_is_of_files_labels_and_splits(images, tmp_path):
    def digest(folder):
        return digest_data(put_aside(load_images(str(folder))))

    shutil.copytree(images, tmp_path / "a")
    before = digest(images)
    assert before == digest(tmp_path / "a") and list(before) == ["labels", "train", "validation", "test"]
    (tmp_path / "a" / "dark" / "9.png").rename(tmp_path / "a" / "dark" / "z.png")
    assert digest(tmp_path / "a") != before
    (tmp_path / "a" / "dark" / "z.png").rename(tmp_path / "a" / "dark" / "9.png")
    (tmp_path / "a" / "light").rename(tmp_path / "a" / "lit")
    assert digest(tmp_path / "a")["labels"] == "dark, lit"


def test_early_stopping_begins_and_goes_on_in_resumed_runs(fit, run_json, tmp_path):
    fit("--method", "linear", "--learning-rate", "1e-30", steps=4)  # an epoch; the accuracy never changes
    again = ["train", "--output", tmp_path / "run", "--resume", "--no-measuring", "--max-steps", "20"]
    assert run_json(*again, "--early-stopping", "1")["steps"] == 12, "the second epoch with a score is no better"
    assert run_json(*again, "--early-stopping", "2")["steps"] == 16, "the count went on"


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_loaded_leaves_the_settings(fit, tmp_path):
    fit("--set", "trainable_blocks=last:2")
    stored = (tmp_path / "run" / "settings.yaml").read_text()
    (tmp_path / "run" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"damaged")
    _, err = fit("--set", "trainable_blocks=last:2", "--resume", "--epochs", "7", code=2, steps=3)
    assert "no checkpoint in" in err and "is complete" in err
    assert (tmp_path / "run" / "settings.yaml").read_text() == stored


@pytest.mark.parametrize(("flags", "step"), [([], 2), (["--keep", "best"], 6)])
def test_an_interrupted_run_is_saved_and_says_how_it_goes_on(flags, step, run, base, images, tmp_path, monkeypatch):
    real = train.make_trainer

    def with_interrupt(*args, **kwargs):
        trainer = real(*args, **kwargs)
        run_step = trainer.training_step

        def training_step(*a, **k):
            if trainer.state.global_step == step - 1:
                signal.raise_signal(signal.SIGINT)
            return run_step(*a, **k)

        trainer.training_step = training_step
        return trainer

    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "make_trainer", with_interrupt)
    command = ["train", "--model", base, "--dataset", images, "--output", tmp_path, "--batch-size", "4"]
    code, _, err = run(*command, *flags, "--max-steps", "8", "--no-measuring", "--json")
    assert code == 130
    assert f"saved after step {step}; to continue: peft-bsr train --output {tmp_path} --resume" in err
    assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "checkpoints" / f"checkpoint-{step}").is_dir() and not (tmp_path / "adapter").exists()
    monkeypatch.setattr(train, "make_trainer", real)
    code, out, err = run("train", "--output", tmp_path, "--resume", "--no-measuring", "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 8
