"""No method makes the host wait for the device in a forward and a backward: no number of a tensor reaches Python."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.bincount.default,
}
CONFIGS = {
    "bsr": lambda: BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1]),
    "bsr max": lambda: BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1], lean="max"),
    "bsr off": lambda: BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1], lean="off"),
    "full view": lambda: BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1], mode="full_view"),
    "int8": lambda: BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1], saved_activations="int8"),
    "lora": lambda: BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1], trainable="lora"),
    "alast": lambda: ALaSTConfig(trainable_blocks_per_step=2),
    "synqt": lambda: SynQTConfig(),
}


class Waiting(TorchDispatchMode):
    """Counts operations for whose result the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITING:
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_method_waits(name):
    base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3))
    model = get_peft_model(base, CONFIGS[name]()).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    model(pixel_values=images, labels=labels).loss.backward()  # ALaST draws here, once in an optimizer's step
    with Waiting() as waiting:
        model(pixel_values=images, labels=labels).loss.backward()
    assert not waiting.found


def test_a_draw_of_alast_waits_once():
    base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3))
    model = get_peft_model(base, CONFIGS["alast"]()).train()
    images = torch.randn(2, 3, 32, 32)
    model(pixel_values=images).logits.sum().backward()
    model.base_model.schedule().next_step()
    with Waiting() as waiting:
        model(pixel_values=images).logits.sum().backward()
    assert sum(waiting.found.values()) <= 5, "one transfer of a number for each block, and of the count of images"


def test_the_counter_sees_what_waits():
    with Waiting() as waiting:
        torch.ones(2).sum().item()
    assert waiting.found
