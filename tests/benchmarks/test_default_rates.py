"""The comparison of default rates with a sweep: at toy size, and its verdict on made-up scores."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_method_comparison import sources  # noqa: F401 (a fixture)

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "default_rates.py"
RATES = ("1.0e-04", "3.2e-04", "1.0e-03", "3.2e-03", "1.0e-02")


@pytest.mark.parametrize(("of_the_best", "code"), [(0.72, 0), (0.74, 1)])
def test_the_verdict_on_scores_that_are_there(of_the_best: float, code: int, tmp_path: Path, monkeypatch, capsys):
    scores = dict(zip(RATES, (0.4, 0.6, 0.71, of_the_best, 0.5), strict=True))
    for rate, score in scores.items():
        path = tmp_path / "cpu" / "digits" / "bsr" / f"{rate}-seed-0.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"train_info": {"metrics": [{"accuracy": score}]}}))
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ["--results", str(tmp_path), "--tasks", "digits", "--methods", "bsr"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    assert left.value.code == code
    behind = 100 * (of_the_best - 0.71)
    assert f"| digits | bsr | 1e-03 | 71.0 | 3.2e-03 | {100 * of_the_best:.1f} | {behind:.1f} |" in said
    assert "torch " in said


@pytest.mark.slow
def test_it_runs_at_toy_size(sources, tmp_path: Path):  # noqa: F811
    command = [sys.executable, str(SCRIPT), "--results", str(tmp_path), "--tasks", "colours", "--methods", "bsr"]
    for name in ("model", "data", "protocol"):
        command += [f"--{name}", str(sources[name])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode in (0, 1) and "| colours | bsr | 1e-03 |" in ran.stdout, ran.stderr
    assert len(list(tmp_path.rglob("*.json"))) == len(RATES)
