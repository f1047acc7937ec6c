"""No method makes the host wait for the device in a forward and a backward: no number of a tensor reaches Python."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, MoEConfig, SynQTConfig, TaskConfig, record_usage

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.bincount.default,
}
READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
PICKING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
TASKS = {
    "kinds": 3,
    "angle": TaskConfig("angle", 1, "regression"),
    "parts": TaskConfig("parts", 4, "segmentation"),
    "depth": TaskConfig("depth", 1, "regression_map"),
}
LABELS = {
    "kinds": torch.tensor([1]),
    "angle": torch.tensor([[0.5]]),
    "parts": torch.arange(2 * 16).view(2, 4, 4) % 4,
    "depth": torch.full((1, 1, 4, 4), 0.5).index_fill(3, torch.tensor([0]), torch.nan),
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


class Reading(TorchFunctionMode):
    """Counts lists made from tensors, which run no operation if the tensor is on the CPU."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READING:
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Waiting(TorchDispatchMode):
    """Counts operations for whose result the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.reading = Reading(self.found)

    def __enter__(self) -> Waiting:
        self.reading.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.reading.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        picks = function in PICKING and any(t is not None and t.dtype == torch.bool for t in args[1])
        if function in WAITING or picks:  # a mask is turned into numbers of rows
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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [None, "full", "lora"])
def test_tasks_and_experts_do_not_wait(kind, checkpointing, monkeypatch):
    """On a device that is not the CPU; here its layout of experts is asked for."""
    monkeypatch.setattr("peft_bsr.core.experts.is_traced", lambda: True)
    moe = kind and MoEConfig(num_experts=4, top_k=2, expert_type=kind, balance_weight=0.01, noise=1.0)
    config = BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1], mode="full_view", tasks=TASKS, moe=moe)
    base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3))
    model = get_peft_model(base, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    images = torch.randn(5, 3, 32, 32)
    with Waiting() as waiting, record_usage(model):
        model(pixel_values=images, task_ids=[2, 0, 1, 2, 3], labels=LABELS).loss.backward()
        model(pixel_values=images, task=["kinds", "angle"] * 2 + ["kinds"], labels=torch.zeros(5)).loss.backward()
    assert not waiting.found


def test_a_draw_of_alast_waits_once():
    base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=3))
    model = get_peft_model(base, CONFIGS["alast"]()).train()
    images = torch.randn(2, 3, 32, 32)
    model(pixel_values=images).logits.sum().backward()
    model.base_model.schedule().next_step()
    with Waiting() as waiting:
        model(pixel_values=images).logits.sum().backward()
    assert sum(waiting.found.values()) == 1, "one transfer of all changes and of the count of images"


def test_the_counter_sees_what_waits():
    with Waiting() as waiting:
        torch.ones(2).sum().item()
    assert sum(waiting.found.values()) == 1
    with Waiting() as waiting:
        torch.ones(2).tolist()
    assert waiting.found
    with Waiting() as waiting:
        torch.ones(2)[torch.tensor([True, False])]
    assert waiting.found
