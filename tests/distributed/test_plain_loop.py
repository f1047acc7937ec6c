"""A plain torch loop under torchrun: two processes do the steps of one, stop, change their number, and die."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import (
    CONFIGS,
    STEPS,
    make_base,
    make_model,
    make_optimizer,
    probe_batch,
    train,
    weights_of,
)
from tests.distributed.launch import launch

pytestmark = pytest.mark.dist
SIDE = {case: name for case in CONFIGS for name in ("SynQT", "LoSA") if case.startswith(name.lower())}
PAIRS = [(how, case) for how in ("ddp", "fsdp2") for case in CONFIGS if not (how == "fsdp2" and case in SIDE)]
PAIRS += [("fsdp2_root", case) for case in ("bsr_reduced", *SIDE)]
RESUMED = [
    (how, case)
    for how, case in PAIRS
    if case in ("bsr_reduced", "bsr_lora", "tasks_full", "synqt", "losa", "alast_sample")
    and not (how == "fsdp2_root" and case == "bsr_reduced")
]
HALF = STEPS // 2


@cache
def one_process(case: str) -> dict[str, Any]:
    """Losses and weights of one process that trains on both halves of each batch."""
    model = make_model(case)
    start = weights_of(model)
    losses = train(case, model, make_optimizer(model), [0, 1], range(STEPS))
    weights = weights_of(model)
    assert sum(not torch.equal(weights[name], tensor) for name, tensor in start.items()) > 10, "nothing trained"
    return {"losses": losses, "weights": weights}


def found_in(folder: Path, name: str, processes: int = 2) -> list[dict[str, Any]]:
    """What each process of a job found."""
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(processes)]
    errors = [part["error"] for part in found if "error" in part]
    assert not errors, errors[0]
    return found


def interleaved(found: list[dict[str, Any]]) -> list[float]:
    return [loss for pair in zip(*(part["losses"] for part in found), strict=True) for loss in pair]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **(tolerance or {"rtol": 1e-4, "atol": 1e-6}), msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All jobs that end, in three starts of torchrun: 2 processes, then 1, then 2."""
    folder = tmp_path_factory.mktemp("runs")
    refused = [("fsdp2", case) for case in SIDE]
    jobs = [{"name": f"whole-{h}-{c}", "case": c, "how": h} for h, c in (*PAIRS, *refused)]
    saves = {(h, c): str(folder / f"by_two-{h}-{c}") for h, c in RESUMED}
    jobs += [{"name": f"begun-{h}-{c}", "case": c, "how": h, "last": HALF, "save": s} for (h, c), s in saves.items()]
    launch("worker.py", folder, jobs, processes=2)
    jobs = [
        {"name": f"2to1-{h}-{c}", "case": c, "how": "alone", "first": HALF, "load": s} for (h, c), s in saves.items()
    ]
    saves = {c: str(folder / f"by_one-{c}") for _, c in RESUMED}
    jobs += [{"name": f"begun-{c}", "case": c, "how": "alone", "last": HALF, "save": s} for c, s in saves.items()]
    launch("worker.py", folder, jobs, processes=1)
    jobs = [{"name": f"1to2-{h}-{c}", "case": c, "how": h, "first": HALF, "load": saves[c]} for h, c in RESUMED]
    launch("worker.py", folder, jobs, processes=2)
    return folder


@pytest.mark.parametrize(("how", "case"), [pair for pair in PAIRS if pair[1] != "bsr_int8"])
def test_two_processes_do_the_steps_of_one(runs: Path, how: str, case: str):
    """DDP does not look for unused parameters where the plan is static."""
    found, expected = found_in(runs, f"whole-{how}-{case}"), one_process(case)
    assert interleaved(found) == pytest.approx(expected["losses"], abs=1e-5)
    for part in found:
        assert_close(part["weights"], expected["weights"])
    assert all(torch.equal(t, found[1]["weights"][name]) for name, t in found[0]["weights"].items())


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_activations_in_8_bits(runs: Path, how: str):
    """Rounding is random and each process draws for itself, so only the first losses are those of one process."""
    found, expected = found_in(runs, f"whole-{how}-bsr_int8"), one_process("bsr_int8")
    assert interleaved(found)[:2] == pytest.approx(expected["losses"][:2], abs=1e-5)
    for name, tensor in expected["weights"].items():
        assert torch.equal(found[0]["weights"][name], found[1]["weights"][name])
        torch.testing.assert_close(found[0]["weights"][name], tensor, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("how", "case"), [pair for pair in PAIRS if pair[1] != "part_beside_lora"])  # which trains too
def test_disabled_it_is_the_base_model(runs: Path, how: str, case: str):
    base = make_model(case).unload() if case == "bsr_bfloat16" else make_base(case)  # which is rounded for good
    with torch.no_grad():
        expected = base.eval()(**probe_batch(case)).logits
    for part in found_in(runs, f"whole-{how}-{case}"):
        assert torch.equal(part["disabled"], expected)


@pytest.mark.parametrize("case", SIDE)
def test_blocks_that_a_side_network_reads_cannot_be_sharded_by_themselves(runs: Path, case: str):
    for part in found_in(runs, f"whole-fsdp2-{case}"):
        assert part["refused"].startswith(f"AdapterError: {SIDE[case]} reads the weights of block ")
        assert "outside of the block's own forward and backward" in part["refused"]
        assert "Call `fully_shard(model)` for the whole model only" in part["refused"]


@pytest.mark.parametrize(("how", "case"), RESUMED)
@pytest.mark.parametrize("change", ["2to1", "1to2"])
def test_a_run_goes_on_with_another_number_of_processes(runs: Path, change: str, how: str, case: str):
    found, expected = found_in(runs, f"{change}-{how}-{case}", 1 if change == "2to1" else 2), one_process(case)
    losses = found[0]["losses"] if change == "2to1" else interleaved(found)
    assert losses == pytest.approx(expected["losses"][2 * HALF :], abs=1e-5)
    for part in found:
        assert_close(part["weights"], expected["weights"])


@pytest.mark.parametrize(
    ("how", "case"), [("ddp", "bsr_reduced"), ("fsdp2", "tasks_full"), ("ddp", "synqt"), ("fsdp2", "alast_sample")]
)
def test_a_process_that_is_killed_costs_no_step(tmp_path: Path, how: str, case: str):
    """torchrun starts both anew; they go on from the last whole checkpoint."""
    job = {"name": "killed", "how": how, "case": case, "dies_at": 2}
    launch("worker.py", tmp_path, [job], processes=2, options=("--max-restarts", "3"))
    found, expected = found_in(tmp_path, "killed"), one_process(case)
    assert (tmp_path / "killed" / "was_killed").exists()
    for part in found:
        assert part["restarts"] >= 1
        assert_close(part["weights"], expected["weights"])
