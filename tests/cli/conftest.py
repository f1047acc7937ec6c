"""A tiny base model in a folder, images by class in another, and one training run that several tests look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from peft_bsr_cli import main


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 4 blocks for images of 32 pixels."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of two classes, dark and light."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (folder / name).mkdir()
        for index in range(10):
            pixels = generator.integers(128 * number, 128 * number + 100, (24, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def trained(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of two steps wrote."""
    output = tmp_path_factory.mktemp("run")
    command = ["train", "--model", str(base), "--dataset", str(images), "--output", str(output)]
    assert main([*command, "--max-steps", "2", "--batch-size", "4", "--set", "trainable_blocks=last:2", "--json"]) == 0
    return output


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """`run("inspect", folder)`: exit code, stdout and stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def run_json(run: Callable) -> Callable[..., dict[str, Any]]:
    """The same with `--json`: what was on stdout, read."""

    def call(*arguments: Any) -> dict[str, Any]:
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call
