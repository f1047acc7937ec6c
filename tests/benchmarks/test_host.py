"""What a training step costs the host: Python calls and operations are held, as they do not vary; times are not."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

from peft_bsr import BSRConfig, ConfigError

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, FOLDER)

import host  # noqa: E402

sys.path.remove(FOLDER)
BARS = {key: bar for key, bar in host.BARS.items() if key[2] != "host"}
counts = cache(host.count)


@pytest.mark.parametrize(("row", "mode", "figure", "base"), BARS, ids=map(" ".join, BARS))
def test_counts_are_held(row, mode, figure, base):
    assert counts(row, mode)[figure] / counts(base, mode)[figure] <= BARS[row, mode, figure, base]


@pytest.mark.parametrize("row", ["full", "max", "alast", "synqt"])
def test_counts_do_not_vary(row):
    assert host.count(row, "fp32") == counts(row, "fp32")


def test_what_is_counted():
    """12 blocks of 4 + 2 Linears, each one product forward and two backward, and 2 of the first patch and the head."""
    full = counts("full", "fp32")
    assert full["ops"] == 474  # as these versions of torch and transformers do it
    assert full["calls"] > 1000
    assert counts("lora", "fp32")["ops"] > 2 * full["ops"]
    assert counts("full", "autocast")["ops"] > full["ops"] + 140  # a cast of each weight, at least


def test_weights_in_bf16_are_not_counted_without_autocast():
    with pytest.raises(ConfigError, match="weights in bf16 need autocast"):
        host.count("exact-bf16", "fp32")


def test_times_stand_beside_counts(monkeypatch):
    """The same in a process of its own is tried among the slow tests."""

    def in_this_process(script, worker, row, *rest):
        return {mode: host.seconds(row, mode, 3) for mode in rest if mode in host.MODES}

    monkeypatch.setattr(host, "in_own_process", in_this_process)
    found = host.measure(["full", "lora", "stock"], ["counts", "time"], rounds=1, steps=3)
    stock = found["stock"]["fp32"]
    assert {name: stock[name] for name in ("calls", "ops")} == counts("stock", "fp32")
    assert 0 < stock["host"] <= stock["host, median"]
    table = host.table(found, "fp32")
    assert f"| {stock['ops']:.0f} | {stock['ops'] / 474:.2f} (bar 0.95: " in table
    assert f"| {stock['host']:.2f} | {stock['host'] / found['full']['fp32']['host']:.2f} |  | " in table


def test_a_row_that_this_version_has_not_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(host.ROWS, "max", ("BSR max", lambda: BSRConfig(lean="more")))
    found = host.measure(["full", "lora", "max"], ["counts"], rounds=0, steps=0)
    assert "BSR max: not in fp32. BSRConfig: `lean='more'` is unknown." in host.table(found, "fp32")
