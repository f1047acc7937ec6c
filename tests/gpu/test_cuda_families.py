"""On a CUDA card: each method on every tiny family of the contract in training, in fp32 and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_bsr import ALaSTConfig, BSRConfig, MoEConfig, SynQTConfig, UnsupportedModelError
from peft_bsr.backbones import tensors_of
from tests.contract.families import SUPPORTED, run_batch
from tests.gpu.setting import DEVICE, ON_A_CARD, assert_near, autocast

pytestmark = ON_A_CARD
REDUCED = {"trainable_blocks": [1, 3], "reduction_blocks": [1], "keep_rate": 0.7}
METHODS = {
    "bsr": lambda: BSRConfig(**REDUCED),
    "lora": lambda: BSRConfig(**REDUCED, trainable="lora"),
    "experts": lambda: BSRConfig(**REDUCED, tasks={"a": 3}, moe=MoEConfig(num_experts=4, top_k=1)),
    "alast": lambda: ALaSTConfig(trainable_blocks_per_step=2),
    "synqt": lambda: SynQTConfig(dropout=0.0, drop_path=0.0),
}


def step(model: nn.Module, inputs: dict[str, Any], device: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Gradients on the CPU of a training step on `device`."""
    model.to(device).zero_grad()
    torch.manual_seed(7)
    with autocast(dtype):
        outputs = tensors_of(model(**{name: value.to(device) for name, value in inputs.items()}))
    sum(output.float().square().mean() for output in outputs if output.is_floating_point()).backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def bad(found: dict[str, Any]) -> list[str]:
    return [name for name, gradient in found.items() if not gradient.isfinite().all()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SUPPORTED)
def test_training(family, method):
    """In fp32 the gradients of the CPU, under autocast finite ones where the stock model's are."""
    inputs = run_batch(SUPPORTED[family]())
    torch.manual_seed(0)
    try:
        model = get_peft_model(SUPPORTED[family](), METHODS[method]()).train()
    except UnsupportedModelError as error:
        pytest.skip(str(error).splitlines()[0])
    expected = step(model, inputs, "cpu")
    assert_near(step(model, inputs, DEVICE), expected, 1e-3)
    found = bad(step(model, inputs, DEVICE, torch.bfloat16))
    if found and (stock := bad(step(SUPPORTED[family]().train(), inputs, DEVICE, torch.bfloat16))):
        pytest.skip(f"the stock model's own gradients are not finite under autocast: {stock[:3]}")
    assert not found
