"""Adapter files with random damage: an error of our own or a model that runs, nothing executed, the base as it was."""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_bsr import PeftBsrError, check_adapter
from tests.bad_input.conftest import make_vit
from tests.tuners.conftest import assert_same_state, state_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VALUES = [None, True, -1, 0, 2**70, 1e400, float("nan"), "", "x" * 1000, [], [[]], {}, {"a": {}}, "__import__('os')"]

_unpickled: list[Any] = []
sys.addaudithook(lambda event, args: _unpickled.append(args) if event == "pickle.find_class" else None)


def flip_bytes(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    end = chance.choice([8, 400, len(content)])  # the length of the header, the header, all of it
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(min(end, len(content)))] = chance.randrange(256)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def append(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 100)))


def swap_header(path: Path, chance: random.Random) -> None:
    """Other shapes, types and places in the header of safetensors, or one that is huge."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensor = header[chance.choice([name for name in header if name != "__metadata__"])]
    field = chance.choice(["dtype", "shape", "data_offsets"])
    tensor[field] = chance.choice([*VALUES, "F16", "I64", [4, 4], [-1], [0, 2**62]])
    changed = json.dumps(header).encode() + b" " * chance.choice([0, 0, 200_000])
    claimed = chance.choice([len(changed), len(changed), 2**40, 2**63])
    path.write_bytes(struct.pack("<Q", claimed) + changed + content[8 + length :])


def swap_values(path: Path, chance: random.Random) -> None:
    """Values of other types in the configuration."""
    values = json.loads(path.read_text())
    for name in chance.sample(sorted(values), chance.randint(1, 3)):
        if name != "peft_type":
            values[name] = chance.choice(VALUES)
    path.write_text(json.dumps(values))


DAMAGES: list[tuple[str, Callable[[Path, random.Random], None]]] = [
    *((WEIGHTS, damage) for damage in (flip_bytes, truncate, append, swap_header)),
    *((CONFIG, damage) for damage in (flip_bytes, truncate, append, swap_values, swap_values)),
]


def fuzz(folder: Path, saved: Path, seed: int) -> str:
    chance = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    name, damage = DAMAGES[seed % len(DAMAGES)]
    damage(folder / name, chance)
    _unpickled.clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings that nobody knows are left out with a warning
            check_adapter(folder)
    except PeftBsrError:
        outcome = "refused"
    else:
        base = make_vit()
        before = state_of(base)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(base, folder).eval()
        except PeftBsrError:
            assert_same_state(base, before)
            outcome = "taken back"
        else:
            settings = {"task": "zoo"} if getattr(model.peft_config["default"], "tasks", None) else {}
            with torch.no_grad():
                model(pixel_values=torch.zeros(1, 3, 32, 32), **settings)
            outcome = "runs"
    assert not _unpickled, f"seed {seed} unpickled {_unpickled}"
    return outcome


@pytest.mark.parametrize("method", ["bsr", "alast", "synqt"])
def test_a_little_of_it(method, saved, tmp_path):
    outcomes = [fuzz(tmp_path / "adapter", saved(method), seed) for seed in range(27)]
    assert "refused" in outcomes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bsr", "lora", "tasks", "alast", "synqt"])
def test_much_of_it(method, saved, tmp_path):
    outcomes = [fuzz(tmp_path / "adapter", saved(method), seed) for seed in range(2000)]
    assert {"refused", "runs"} <= set(outcomes)
