"""Exit codes and messages: one line on stderr, no traceback unless it is asked for."""

from __future__ import annotations

import builtins
import errno

import pytest
from safetensors import SafetensorError

from peft_bsr.cli import sources
from peft_bsr_cli import COMMANDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "./nowhere"], "there is no folder `./nowhere`."),
        (["inspect", "{images}"], "has neither config.json nor adapter_config.json"),
        (["train", "--dataset", "digits"], "there is no base model. Pass `--model`"),
        (["train", "--config", "nowhere.yaml"], "`--config nowhere.yaml` cannot be read"),
        (
            ["train", "--model", "{base}", "--method", "magic"],
            "Use one of bsr, alast, losa, synqt, lora, full, linear.",
        ),
        (
            ["train", "--model", "{base}", "--set", "keep_rat=1"],
            "unknown option of bsr: `keep_rat`. Did you mean keep_rate",
        ),
        (["train", "--model", "{base}", "--set", "xyz=1"], "unknown option of bsr: `xyz`. Use one of auto_mapping, "),
        (["train", "--model", "{base}", "--set", "keep_rate=2"], "BSRConfig: `keep_rate=2`"),
        (["train", "--model", "{base}", "--set", "keep_rate"], "`keep_rate` must be NAME=VALUE"),
        (
            ["train", "--model", "{base}", "--set", "keep_rate=[1"],
            "`keep_rate=[1` must be NAME=VALUE, with a value",
        ),
        (["train", "--model", "{base}", "--trainer", "warmup_steps=few"], "`warmup_steps=few` must be a number"),
        (["train", "--model", "{base}", "--set", "r=1.5"], "`r=1.5` must be an integer"),
        (["train", "--model", "{base}", "--trainer", "fp61=true"], "unknown field of TrainingArguments: `fp61`"),
        (["train", "--model", "{base}", "--trainer", "seed=1"], "`--trainer seed=...`: use the flag `--seed`"),
        (["train", "--model", "{base}", "--resume", "--output", "nowhere"], "there is no checkpoint in `nowhere"),
        (["train", "--model", "{base}", "--dataset", "./nowhere"], "`./nowhere` cannot be read"),
        (["train", "--model", "{adapter}", "--dataset", "digits", "--output", "new"], "is an adapter"),
        (["merge", "{base}", "--output", "merged"], "is a model, not an adapter"),
        (["show", "nowhere.png", "--model", "{adapter}"], "there is no file `nowhere.png`."),
        (["show", "{adapter}/README.md", "--model", "{adapter}"], "README.md` is not an image."),
        (["show", "{images}", "--model", "{adapter}", "--output", "kept.xyz"], "no picture ends in `.xyz`. Use .png"),
        (["compare", "{base}", "--repeats", "0"], "must be at least 1"),
        (["plan", "{base}", "--memory", "lots"], "`memory='lots'` is not understood"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, run, base, images, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"base": base, "images": images, "adapter": trained / "adapter"}
    code, out, err = run(*(argument.format(**places) for argument in arguments))
    said = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert said.startswith("peft-bsr: ")
    assert message in said
    assert "Traceback" not in err


def test_a_file_of_settings_is_checked(run, tmp_path):
    path = tmp_path / "run.yaml"
    for text, message in (
        ("learning-rate: 1", "unknown setting"),
        ("model: x\nepochs: many", "`epochs: many` must be a number"),
        ("- model", "must be names and values"),
        ("a: [", "is not valid YAML"),
        ("model: &a [*a]", "contains itself"),
    ):
        path.write_text(text)
        code, _, err = run("train", "--config", path)
        assert code == 2
        assert message in err


def test_what_argparse_refuses_is_code_2(run):
    assert run()[0] == 2
    assert run("dance")[0] == 2
    code, _, err = run("plan", "model")
    assert code == 2
    assert "--memory" in err


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "export"])
def test_help_has_examples(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"  peft-bsr {command} " in out


def test_a_failure_is_code_1_and_debug_shows_where(run, base, monkeypatch):
    def fail(name):
        raise RuntimeError("the disk\nis on fire")

    monkeypatch.setattr(sources, "read_model_config", fail)
    code, out, err = run("inspect", base)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "peft-bsr: RuntimeError: the disk is on fire"
    assert "Traceback" not in err
    assert "Traceback" in run("inspect", base, "--debug")[2]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "outputs"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["full", "not mine", "safetensors", "torch.save"],
)
def test_a_folder_that_takes_no_file_is_one_line_and_code_2(error, run, base, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(sources, "read_model_config", fail)
    code, out, err = run("inspect", base)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("peft-bsr: cannot write: ")


def test_an_interrupt_is_code_130(run, base, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "read_model_config", interrupt)
    assert run("inspect", base)[0] == 130


def test_a_missing_package_is_named(run, base, monkeypatch):
    import sys

    real = builtins.__import__

    def without_rich(name, *rest):
        if name.partition(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'", name="rich")
        return real(name, *rest)

    for name in [n for n in sys.modules if n == "peft_bsr.cli.output" or n.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_rich)
    code, _, err = run("inspect", base)
    assert code == 1
    assert "the package `rich` is not installed. Run `pip install 'peft-bsr[cli]'`." in err
