"""The GPU's benchmark, on a toy on the CPU: what a row says, what is recorded, where a rerun goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peft_bsr.cost import Setup

FOLDER = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, FOLDER)

import gpu  # noqa: E402
import gpu_step  # noqa: E402
from gpu_rows import LEVELS, METHODS, MODELS, MODES, ROWS, Row  # noqa: E402

sys.path.remove(FOLDER)
TWO = [Row("linear probe"), Row("BSR", "exact")]


def test_rows_are_unlike_and_all_that_is_asked_for_is_there():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert {row.method for row in ROWS} == set(METHODS) and {row.mode for row in ROWS} == set(MODES)
    assert {row.lean for row in ROWS} == {"", *LEVELS} and {row.model for row in ROWS} == set(MODELS["full"])
    for row in ROWS:
        row.config(MODELS["full"][row.model])  # refuses what it does not know


@pytest.mark.parametrize(
    ("row", "parts"), [(Row("linear probe"), ("classifier.",)), (Row("last 3 blocks"), (".9.", ".10.", ".11.", "norm"))]
)
def test_what_trains_without_an_adapter(row, parts):
    model = row.base(MODELS["tiny"]["ViT-B/16"], "meta")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(any(part in name for part in (*parts, "classifier.")) for name in trained)
    assert all(any(part in name for name in trained) for part in parts)


@pytest.mark.slow
def test_a_row_is_measured_and_predicted(monkeypatch):
    monkeypatch.setattr(gpu_step, "TIMED_SECONDS", 0.1)
    row = Row("BSR", "exact", batch=8)
    found = gpu_step.measure(row, "tiny", "cpu", "64MiB")
    assert found["status"] == "measured", found
    assert found["batch"] == 4 and found["steps"] >= 8
    least, most = found["step_ms_range"]
    assert least <= found["step_ms"] <= most
    assert found["images_per_s"] == pytest.approx(4000 / found["step_ms"], rel=0.01)
    guess = gpu_step.guess(row, MODELS["tiny"]["ViT-B/16"], 4, "cpu")
    assert found["kept_mib_per_image"] == pytest.approx(guess.saved_bytes / 4 / 2**20, abs=0.006)
    assert found["trained"] == guess.trainable_parameters
    assert not found["compiled_while_timed"] and found["optimizer"] == "torch.AdamW"


@pytest.mark.parametrize(
    ("row", "device", "expected"),
    [
        (Row("BSR", "exact"), "cuda", Setup(8, None, "adamw_fused")),
        (Row("BSR", optimizer="8-bit"), "cuda", Setup(8, None, "adamw_8bit")),
        (Row("BSR", mode="compiled, budget .2"), "cuda", Setup(8, None, "adamw_fused", compile=True)),
        (Row("BSR", mode="checkpointing"), "cuda", Setup(8, None, "adamw_fused", gradient_checkpointing=True)),
        (
            Row("BSR", mode="offloaded checkpointing"),
            "cuda",
            Setup(8, None, "adamw_fused", device="cuda", gradient_checkpointing="offload"),
        ),
        (
            Row("BSR", mode="offloaded checkpointing"),
            "cpu",
            Setup(8, None, "adamw_fused", gradient_checkpointing=True),
        ),
    ],
)
def test_the_planner_is_asked_for_the_step_that_runs(monkeypatch, row, device, expected):
    asked = []

    def answer(_, config, setup):
        asked.append((setup, torch._functorch.config.activation_memory_budget))

    monkeypatch.setattr(gpu_step, "estimate", answer)
    gpu_step.guess(row, MODELS["tiny"]["ViT-B/16"], 8, device)
    assert asked == [(replace(expected, device=device, autocast=torch.bfloat16), 0.2 if "budget" in row.mode else 1.0)]


@pytest.mark.slow
def test_compiled_rows_are_predicted_with_their_budget():
    sizes = MODELS["tiny"]["ViT-B/16"] | {"num_hidden_layers": 2}
    rows = [Row("full fine-tuning", mode=mode) for mode in ("eager", "compiled", "compiled, budget .2")]
    eager, compiled, budgeted = (gpu_step.guess(row, sizes, 4, "cpu").saved_bytes for row in rows)
    assert budgeted < 0.5 * compiled < 0.5 * eager


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("of 80 GiB"), "out of memory"), (TypeError("no\n such"), "failed")]
)
def test_what_goes_wrong_is_a_result(monkeypatch, error, status):
    def fail(*_):
        raise error

    monkeypatch.setattr(gpu_step.Training, "figures", fail)
    found = gpu_step.measure(Row("linear probe"), "tiny", "cpu", "64MiB")
    assert found["status"] == status
    assert found["error"] == f"{type(error).__name__}: {' '.join(str(error).split())}"


@pytest.mark.parametrize("predicted", [1, 90, 5000])
@pytest.mark.parametrize("raises", [False, True])
def test_the_largest_batch_is_corrected_by_what_is_measured(monkeypatch, predicted, raises):
    training = gpu_step.Training(Row("linear probe", batch=None), "tiny", "cpu")
    tried = []

    def peak(size):
        tried.append(size)
        if raises and 2000 + 70 * size > 22_000:
            raise torch.OutOfMemoryError
        return 2000, 70 * size, None

    for name, stand_in in {"load": print, "step": dict, "_predicted": lambda _: predicted, "_peak": peak}.items():
        monkeypatch.setattr(training, name, stand_in)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80_000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: tried.append(share))
    training.device = "cuda"
    found = training._largest(22_000)
    assert tried[0] == pytest.approx(0.275) and found in tried
    assert 0.9 * 285 <= found <= 285  # 285 images take 21 950


class Answers:
    """Stands in for processes: answers one after the other, exceptions raised."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, _):
        return self

    def call(self, function, *arguments, timeout):
        if function is gpu_step.environment:
            return gpu_step.environment("cpu")
        self.asked.append(arguments[0].name)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


DONE = {"status": "measured", "batch": 4, "images_per_s": 10.0, "step_ms": 400.0, "step_ms_range": [399.0, 401.0]}


def run(monkeypatch, path, *answers, seconds=1000.0, again=False):
    processes = Answers(*answers)
    monkeypatch.setattr(gpu, "Forks", processes)
    gpu.run(TWO, gpu.read(path), path, "tiny", "cpu", "64MiB", seconds, "abc", again)
    return processes.asked


def test_a_rerun_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    path, (probe, bsr) = tmp_path / "new" / "gpu.json", [row.name for row in TWO]
    assert run(monkeypatch, path, seconds=0) == []
    assert "2 rows are left" in capsys.readouterr().out
    assert run(monkeypatch, path, DONE, TimeoutError()) == [probe, bsr]  # the clock cuts the second off
    assert run(monkeypatch, path, EOFError("the process ended with exit code -9")) == [bsr]
    assert run(monkeypatch, path) == []
    (found,) = gpu.read(path)["rows"].values()
    assert found == {probe: DONE, bsr: {"status": "failed", "error": "the process ended with exit code -9"}}
    assert "- BSR, exact, batch 128: the process ended with exit code -9" in gpu.table(gpu.read(path))
    assert run(monkeypatch, path, DONE, again=True) == [bsr]
    gpu.add_guesses(gpu.read(path), path)
    assert all(row["guess_mib"] > 0 for row in next(iter(gpu.read(path)["rows"].values())).values())
    assert "| BSR, exact, batch 128 | 10 | 400 | 399 to 401 | - |" in gpu.table(gpu.read(path))


@pytest.mark.slow
def test_the_command(tmp_path):
    path = tmp_path / "gpu.json"

    def command(*options):
        line = [sys.executable, f"{FOLDER}/gpu.py", "--results", str(path), *options]
        ran = subprocess.run(line, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    toy = ("--device", "cpu", "--size", "tiny", "--minutes", "15", "--commit", "abc", "--only")
    names = ("ViT-B/16: linear probe, batch", "ViT-B/16: linear probe, compiled", "ViT-B/16: BSR, exact, largest")
    assert "3 of 3 rows" in command(*toy, *names)
    assert "0 of 3 rows" in command(*toy, *names)
    command("--guess")
    (found,) = json.loads(path.read_text())["rows"].values()
    assert [row["status"] for row in found.values()] == ["measured"] * 3
    probe, bsr, compiled = found.values()
    assert all(row["guess_mib"] > 0 for row in (probe, bsr, compiled))
    assert compiled["graphs"] == 1 and compiled["warm_up_s"] > 1 and not compiled["compiled_while_timed"]
    assert "torch " in command("--table")
