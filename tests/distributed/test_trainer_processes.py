"""The Trainer under `accelerate launch`: two processes, then one, then two, end where one process does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import CONFIGS
from tests.distributed.launch import launch

pytestmark = pytest.mark.dist
CASES = ["bsr_reduced", "bsr_lora", "part", "synqt", "losa", "alast"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole on one process; two steps on two, then two on one, then two on two processes again."""
    assert set(CASES) <= set(CONFIGS)
    whole, changed = (tmp_path_factory.mktemp(name) for name in ("whole", "changed"))
    launch("trainer.py", whole, "whole", CASES, 6, processes=1)
    for name, processes, steps in (("first", 2, 2), ("second", 1, 4), ("third", 2, 6)):
        launch("trainer.py", changed, name, CASES, steps, processes=processes, with_accelerate=processes == 2)
    for path in whole.glob("whole-*.pt"):
        shutil.copy(path, changed)
    return changed


def found(runs: Path, name: str, case: str) -> dict[str, Any]:
    return torch.load(runs / f"{name}-{case}.pt")


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_processes_may_change_at_any_checkpoint(runs: Path, case: str):
    expected, last = found(runs, "whole", case), found(runs, "third", case)
    assert [found(runs, name, case)["processes"] for name in ("whole", "first", "second", "third")] == [1, 2, 1, 2]
    assert sorted(last["losses"]) == sorted(expected["losses"]) == [1, 2, 3, 4, 5, 6]
    assert last["losses"] == pytest.approx(expected["losses"], abs=2e-4)
    for name, tensor in expected["weights"].items():
        torch.testing.assert_close(last["weights"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
