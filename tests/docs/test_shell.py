"""Every `peft-bsr` command of the pages and of the help texts runs, in their order, on tiny models."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from peft_bsr import BSRConfig
from peft_bsr_cli import COMMANDS, main
from tests.docs.test_code_blocks import PAGES

SLOW = {
    "index",
    "planner",
    "cli",
    "export",
    "paper_index",
}  # README, help texts, tests/cli and tests/export have their commands
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRAIN_FIRST = sorted(COMMANDS, key=lambda command: command not in ("train", "export"))  # the others use what it writes


def commands_in(text: str) -> list[list[str]]:
    """Lines `peft-bsr ...`, and `peft-bsr ...` in the middle of prose where it has arguments."""
    inline = re.findall(r"`(peft-bsr \w+ [^`]+)`", text)
    lines = re.findall(r"^ *(peft-bsr .+)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in (*lines, *inline)]


def commands_of_help() -> list[list[str]]:
    texts = (importlib.import_module(f"peft_bsr.cli.{command.replace('-', '_')}").EXAMPLES for command in TRAIN_FIRST)
    return [command for text in texts for command in commands_in(text)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: what they name is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 8, "num_attention_heads": 2, "image_size": 32}
    labels = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    vit = ViTForImageClassification(ViTConfig(**sizes, **labels, intermediate_size=32, patch_size=8))
    dinov2 = Dinov2ForImageClassification(Dinov2Config(**sizes, mlp_ratio=2, patch_size=14))
    short = ViTForImageClassification(
        ViTConfig(**sizes | {"num_hidden_layers": 3}, **labels, intermediate_size=32, patch_size=8)
    )
    text = {"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 60}
    text |= {"hidden_size": 24, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "intermediate_size": 32, "patch_size": 8}
    smolvlm = SmolVLMForConditionalGeneration(SmolVLMConfig(vision_config=vision, text_config=text, image_token_id=59))
    for name, model in {"vit": vit, "dinov2": dinov2, "short": short, "smolvlm": smolvlm}.items():
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / name)
    base = ViTForImageClassification.from_pretrained(tmp_path / "short")
    get_peft_model(base, BSRConfig()).save_pretrained(tmp_path / "adapter")
    for index in range(12):
        image = Image.fromarray(np.full((24, 36, 3), 20 * index, dtype=np.uint8))
        path = tmp_path / "images" / ("dark" if index < 6 else "light") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    rows = [
        f"{path.relative_to(tmp_path)},{path.parent.name},me" for path in sorted((tmp_path / "images").rglob("*.png"))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["file_name,species,photographer", *rows]))
    tags = [f"{path.relative_to(tmp_path)},cat|dog,1,1,0" for path in sorted((tmp_path / "images").rglob("*.png"))]
    tags[0] = tags[0].replace("cat|dog,1,1,0", "fox,0,0,1")
    (tmp_path / "photos.csv").write_text("\n".join(["file_name,tags,cat,dog,fox", *tags]))
    ages = [
        f"{path.relative_to(tmp_path)},{20 + number}" for number, path in enumerate(sorted(tmp_path.rglob("*.png")))
    ]
    (tmp_path / "faces.csv").write_text("\n".join(["file_name,age", *ages]))
    return tmp_path


def as_here(arguments: list[str], folder: Path) -> list[str]:
    """The command with what stands for the names of models, adapters, images and data; training is short."""
    found = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if re.match(r"google/|MODEL$", word):
            word = "vit"
        elif word == "COMMAND":
            word = "plan"
        elif word.startswith("facebook/"):
            word = "dinov2"
        elif word.startswith("HuggingFaceTB/"):
            word = "smolvlm"
        elif re.match(r"me/|ADAPTER$|downloaded$", word) or (
            arguments[0] == "export" and re.match("out", word) and before != "--output"
        ):
            word = "adapter"
        elif before == "--image-size":
            word = "48"  # the models' own is 32
        elif word in ("DATA", "beans", "photos", "new_photos") or word.endswith(".parquet"):
            word = "images"
        elif re.search(r"\.(jpg|png)$|^IMAGE$", word) and before != "--output":
            word = str(next((folder / "images" / "dark").iterdir()))
        found.append(word)
    if arguments[0] == "train":
        steps = 4 if "--resume" in arguments else 2
        found += ["--max-steps", str(steps), "--batch-size", "4", "--no-measuring"]
    if arguments[0] == "compare":
        found += ["--repeats", "1"] + ([] if "--methods" in arguments else ["--methods", "linear", "bsr"])
        found += ["--epochs", "0.5"] if "--dataset" in arguments else []
    if arguments[0] == "plan" and "--limit" not in arguments:
        found += ["--limit", "2"]
    if arguments[0] == "app":
        found.append("--help")  # it serves until it is stopped: tests/app does that
    if arguments[0] == "export":
        found.append("--no-check")  # that is another export, of all tokens; each takes a second for each block
    return found


def run_all(commands: list[list[str]], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands:
        try:
            code = main(as_here(command, folder))
        except SystemExit as left:  # --help, --version
            code = left.code
        assert code == 0, f"peft-bsr {shlex.join(command)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in SLOW else ())
        for page in PAGES
        if commands_in(page.read_text())
    ],
)
def test_the_commands_of_a_page_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    text = page.read_text()
    for language, block in FENCE.findall(text):
        if language == "yaml":
            (folder / "run.yaml").write_text(block.replace("facebook/dinov2-small", "dinov2"))
    commands = commands_in(text)
    if page.stem not in SLOW:
        commands = [command for command in commands if command[0] != "export"]  # the help has the same
    run_all(commands, folder, capsys)


@pytest.mark.parametrize(
    "left_out", [{"int8", "torch.export", "--seconds"}, pytest.param(set(), marks=pytest.mark.slow)]
)
def test_the_commands_of_the_help_run(left_out: set[str], folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "run.yaml").write_text("model: vit\ndataset: images\noutput: outputs/yaml\n")
    commands = [command for command in commands_of_help() if not left_out & {*command}]
    assert len(commands) >= 2 * len(COMMANDS) - 1
    run_all(commands, folder, capsys)
