"""200 steps on real images: the losses of lean training are those of stock training."""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from lean import LEVELS, loss_curve

FOLDER = os.environ.get("PEFT_BSR_DATA")
NEEDED = ("vit-tiny-patch16-224", "cifar10-train-5000.parquet")


@pytest.mark.slow
def test_losses_are_equal_exactly_or_nearly():
    if FOLDER is None or not all((Path(FOLDER) / name).exists() for name in NEEDED):
        pytest.skip(f"PEFT_BSR_DATA={FOLDER!r} is not a folder with {' and '.join(NEEDED)}")
    curves = {level: loss_curve(Path(FOLDER), 200, **LEVELS[level]) for level in LEVELS}
    nudged = loss_curve(Path(FOLDER), 200, nudge=1e-7, **LEVELS["stock"])
    stock = curves["stock"]
    assert statistics.mean(stock[-50:]) < 0.6 * statistics.mean(stock[:10]), "it learns"
    for number in (20, 200):
        noise = max(abs(a - b) for a, b in zip(nudged[:number], stock[:number], strict=True))
        for level in ("exact", "max"):
            assert max(abs(a - b) for a, b in zip(curves[level][:number], stock[:number], strict=True)) <= 10 * noise
    for level in ("exact, int8", "max, int8"):
        assert statistics.mean(curves[level]) == pytest.approx(statistics.mean(stock), rel=0.01)
