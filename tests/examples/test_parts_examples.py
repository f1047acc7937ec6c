"""The examples with larger models run as they are, on their own tiny random models."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file

from tests.examples.test_short_examples import run

__all__ = ["run"]


def sizes_in(printed: str) -> list[float]:
    return [float(size) for size in re.findall(r"([0-9.]+) MiB", printed)]


def test_two_towers(run, tmp_path):
    printed = run("two_towers", "--batches", "30", "--output", "out")
    assert "adapter on `vision_model`" in printed
    whole, kept = sizes_in(printed)
    assert kept < whole / 4
    assert "outputs differ by 0e+00" in printed
    before, now = map(float, re.findall(r"([0-9.]+) before, ([0-9.]+) now", printed)[0])
    assert now > before
    keys = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors").keys()
    assert any("visual_projection" in key for key in keys) and not any("text_model" in key for key in keys)


def test_vision_language(run, tmp_path):
    printed = run("vision_language", "--steps", "20", "--output", "out")
    whole, low_rank, ours, frozen = sizes_in(printed)
    assert frozen < ours < low_rank / 4 < whole / 4
    assert "adapter on `model.vision_model`" in printed and "outputs differ by 0e+00" in printed
    first, last = map(float, re.findall(r"loss ([0-9.]+) in the first step, ([0-9.]+) in step 20", printed)[0])
    assert last < first
    for folder, own in (("language", "lora_"), ("vision", "bsr_params")):
        keys = load_file(tmp_path / "out" / folder / "adapter_model.safetensors").keys()
        assert keys and all(own in key for key in keys)


@pytest.mark.parametrize("name", ["two_towers", "vision_language"])
def test_their_help(run, name, capsys):
    with pytest.raises(SystemExit):
        run(name, "--help")
    assert "--model" in capsys.readouterr().out
