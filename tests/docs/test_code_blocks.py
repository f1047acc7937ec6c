"""Every Python block of the README and the documentation runs, page by page, on a tiny model."""

from __future__ import annotations

import re
import runpy
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from peft import get_peft_model
from PIL import Image as PILImage
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import peft_bsr
from peft_bsr import BSRConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {"new_model", "new_method"}  # in tests/backbones/test_new_model.py, with its model; test_new_method.py
SLOW = {"planner", "export"}  # what they show runs in tests/cost, tests/export and in docstrings too
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUB_MODEL, HUB_ADAPTER = "google/vit-base-patch16-224-in21k", "me/pets-bsr"
TINY = ViTConfig(
    hidden_size=24, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
)


def blocks_of(page: Path) -> str:
    """All blocks of a page as one program, on the lines that they have there."""
    text = page.read_text()
    program = [""] * text.count("\n")
    for match in BLOCK.finditer(text):
        first = text.count("\n", 0, match.start(1))
        code = match[1].splitlines()
        program[first : first + len(code)] = code
    return "\n".join(program)


def make_vit(num_labels: int = 10) -> nn.Module:
    torch.manual_seed(0)
    TINY.num_labels = num_labels
    return ViTForImageClassification(TINY).eval()


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the pages speak of without saying where it is from: a model, a dataset, a batch."""
    images = [PILImage.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(8)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    split = Dataset.from_dict({"image": images, "label": list(range(8))}, features=features)
    pixel_values, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    return {
        "vit": make_vit(),
        "fresh_vit": make_vit,
        "num_classes": 10,
        "images": DatasetDict(train=split, test=split),
        "train_dataset": [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(8)],
        "pixel_values": pixel_values,
        "labels": labels,
        "batch": {"pixel_values": pixel_values, "labels": labels},
    }


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.stem in SLOW else ())
        for page in PAGES
        if "```python" in page.read_text() and page.stem not in ELSEWHERE
    ],
)
def test_the_blocks_run(page: Path, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_vit().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes minutes
    if page.stem in PREPARED:
        PREPARED[page.stem](names, tmp_path, monkeypatch)
    program = blocks_of(page).replace(HUB_MODEL, str(tmp_path / "model")).replace(HUB_ADAPTER, "adapter")
    try:
        exec(compile(program, str(page), "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def with_adapter(names: dict[str, Any], folder: Path, *_: Any) -> None:
    """A model with an adapter, from files that have an image processor, and a photograph."""
    names["model"] = get_peft_model(ViTForImageClassification.from_pretrained(folder / "model"), BSRConfig())
    PILImage.new("RGB", (48, 36), (200, 100, 50)).save(folder / "photo.jpg")


def with_hub(names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter of the page, and a Hub that takes all; the true way up is in tests/hub."""
    base = ViTForImageClassification.from_pretrained(folder / "model")
    get_peft_model(base, BSRConfig()).save_pretrained(folder / "adapter")
    monkeypatch.setattr(peft_bsr, "push_to_hub", lambda *args, **kwargs: None)
    PILImage.new("RGB", (8, 8)).save(folder / "kept_tokens.png")
    names["base"] = make_vit()


def with_one_process(names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


def with_photos(names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter of the page, and two photographs."""
    with_hub(names, folder, monkeypatch)
    for number, name in enumerate(("cat", "dog")):
        PILImage.new("RGB", (48, 36), (200 * number, 100, 50)).save(folder / f"{name}.jpg")


PREPARED = {"export": with_adapter, "predict": with_photos, "hub": with_hub, "distributed": with_one_process}


def test_no_block_is_missed():
    """Blocks are fenced at the start of a line and say `python`; any other fence would not be run."""
    for page in PAGES:
        for fence in re.findall(r"^[ \t]*```\w.*$", page.read_text(), re.MULTILINE):
            assert fence.strip() != "```python" or fence == "```python", f"{page}: {fence}"
            assert fence.strip() in ("```python", "```sh", "```text", "```yaml"), f"{page}: {fence}"


SCRIPT = re.compile(r"python ((?:benchmarks|examples)/[\w/]+\.py)([^`#|>\n]*)")
COMMANDS = sorted({match.groups() for page in PAGES for match in SCRIPT.finditer(page.read_text())})


@pytest.mark.parametrize(("script", "arguments"), COMMANDS, ids=[f"{s}{a.rstrip()}" for s, a in COMMANDS])
def test_the_commands_exist(
    script: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Scripts that pages name are there and know the options that pages give them."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    for beside in (ROOT / script).parent.glob("*.py"):  # tests have modules of the same names
        monkeypatch.delitem(sys.modules, beside.stem, raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert left.value.code == 0
    usage = capsys.readouterr().out
    for option in re.findall(r"--[\w-]+", arguments):
        assert option in usage


def test_the_make_targets_exist():
    targets = {target for page in PAGES for target in re.findall(r"`?make ([a-z-]+)`?(?= *[`#]|$)", page.read_text())}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}"
