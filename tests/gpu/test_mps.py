"""On an Apple laptop's GPU: a step of each method has the gradients of the CPU. Elsewhere all of it skips."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr.cost import PeakMemory
from tests.gpu.setting import METHODS, assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS device"),
]
SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 192}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "int8"])  # its rounding is drawn by the device
def test_a_training_step(method):
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=5))
    model = get_peft_model(base, METHODS[method]()).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    task = {"task": "a"} if method == "experts" else {}
    found = []
    for device in ("cpu", "mps"):
        model.to(device).zero_grad()
        model(pixel_values=images.to(device), labels=labels.to(device), **task).loss.backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert_near(found[1], found[0], 1e-3)


def test_the_peak_of_memory():
    with PeakMemory("mps") as memory:
        torch.ones(2**24, device="mps").sum().item()
    assert memory.added_bytes >= 60 * 2**20
