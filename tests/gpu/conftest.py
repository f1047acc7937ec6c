"""Products of fp32 tensors in fp32, and nothing compiled left of another test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)
