"""Processes with different numbers of batches in a step end where one process with all of them does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.cases import STEPS, make_model, make_optimizer, train, weights_of
from tests.distributed.launch import launch
from tests.distributed.unequal import CASE

pytestmark = pytest.mark.dist


def images_of(packed: torch.Tensor) -> float:
    return packed.view(torch.float64)[4, 1].item()


def test_alast_with_unequal_batches(tmp_path: Path):
    launch("unequal.py", tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = make_model(CASE)
    train(CASE, model, make_optimizer(model), [0, 1, 2], range(STEPS))
    schedule = model.base_model.schedule()
    assert first["drawn"] == second["drawn"] and first["drawn"][-1] == schedule.selected
    for name, tensor in weights_of(model).items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert [images_of(state) for state in first["inside"]] == [3.0] * STEPS  # its own, in the middle of a step
    assert [images_of(state) for state in second["inside"]] == [6.0] * STEPS
    assert [images_of(state) for state in first["between"]] == [9.0] * STEPS  # of both, after it
    assert all(map(torch.equal, first["between"], second["between"]))
    numbers = first["between"][-1].view(torch.float64), schedule.pack().view(torch.float64)
    torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-6, equal_nan=True)
