"""Folders of small images, made as a test asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture() -> Callable[[], Image.Image]:
    """`picture()`: another image of noise, 20 x 30 pixels."""
    generator = np.random.default_rng(0)
    return lambda: Image.fromarray(generator.integers(0, 255, (30, 20, 3), dtype=np.uint8))


@pytest.fixture
def put(tmp_path: Path, picture: Callable) -> Callable[..., Path]:
    """`put("a/cat", "a/dog", n=3)`: three images in each of these folders below `tmp_path`, which is returned."""

    def make(*folders: str, n: int = 3, ending: str = "png") -> Path:
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for index in range(n):
                picture().save(tmp_path / folder / f"{index}.{ending}")
        return tmp_path

    return make
