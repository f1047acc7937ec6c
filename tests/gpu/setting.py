"""What tests on a card share. `PEFT_BSR_TEST_DEVICE=cpu` runs them, smaller, where none is: to see that they would."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, MoEConfig, SynQTConfig

DEVICE = os.environ.get("PEFT_BSR_TEST_DEVICE", "cuda")
ON_A_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
ONLY_CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA alone")
WIDTH, PIXELS = (192, 112) if DEVICE == "cuda" else (48, 32)  # 197 or 17 tokens
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 4 * WIDTH}
SIZES |= {"image_size": PIXELS, "patch_size": 8, "num_labels": 5}
REDUCED = {"trainable_blocks": [1, 3], "reduction_blocks": [1], "keep_rate": 0.6}
LEVELS = [
    {"lean": "exact"},
    {"lean": "max"},
    {"lean": "exact", "trainable": "lora"},
    {"lean": "max", "trainable": "lora"},
    {"lean": "exact", "frozen_weights": "bfloat16"},
]
METHODS = {
    "bsr": lambda: BSRConfig(**REDUCED),
    "int8": lambda: BSRConfig(**REDUCED, saved_activations="int8"),
    "lora": lambda: BSRConfig(**REDUCED, trainable="lora"),
    "experts": lambda: BSRConfig(**REDUCED, tasks={"a": 5, "b": 5}, moe=MoEConfig(num_experts=6, top_k=2)),
    "alast": lambda: ALaSTConfig(trainable_blocks_per_step=2),
    "synqt": lambda: SynQTConfig(dropout=0.0, drop_path=0.0),
}


def batch(size: int = 8, seed: int = 1, method: str = "") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(size, 3, PIXELS, PIXELS, generator=generator), torch.arange(size) % 5
    tasks = {"task_ids": [place % 2 for place in range(size)]} if method == "experts" else {}
    return {"pixel_values": images.to(DEVICE), "labels": labels.to(DEVICE), **tasks}


def make(config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(ViTForImageClassification(ViTConfig(**SIZES)), config).to(DEVICE).train()


def compiled(model: PeftModel, mode: str | None = None) -> Any:
    """The model as one graph; on a CPU, which stands in for a card, without the minutes that inductor takes."""
    how = {"mode": mode} if DEVICE == "cuda" else {"backend": "aot_eager"}
    return torch.compile(model, fullgraph=True, **how)


def autocast(dtype: torch.dtype | None) -> Any:
    return torch.autocast(DEVICE, dtype) if dtype else nullcontext()


def gradients(model: Any, run: Any = None, dtype: torch.dtype | None = None, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with autocast(dtype):
        loss = (model if run is None else run)(**inputs or batch()).loss
    loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=share * scale, msg=lambda m, n=name: f"{n} {m}")
