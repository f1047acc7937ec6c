"""A tiny vision transformer with three tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, MoEConfig

torch.set_num_threads(1)
TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
TASKS = {"zoo": 5, "digits": 4, "clothes": 3}  # not in the order of the alphabet, which files sort by


@pytest.fixture
def make_vit() -> Callable[..., ViTForImageClassification]:
    def make(depth: int = 4, **settings: Any) -> ViTForImageClassification:
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(num_hidden_layers=depth, num_labels=3, **TINY, **settings)).eval()

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make_config() -> Callable[..., BSRConfig]:
    """Blocks 1 and 3 of 4, away from the base model."""

    def make(**settings: Any) -> BSRConfig:
        moe = MoEConfig(**{"num_experts": 5, "top_k": 2, "r": 3, **settings.pop("moe", {})})
        defaults = {"trainable_blocks": [1, 3], "tasks": TASKS, "moe": moe, "init_weights": False, "keep_rate": 0.5}
        return BSRConfig(**{**defaults, **settings})

    return make


@pytest.fixture(params=["full", "lora"])
def expert_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(make_vit: Callable, make_config: Callable, expert_type: str) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(make_vit(), make_config(moe={"expert_type": expert_type})).eval()


@pytest.fixture
def run() -> Callable[..., Any]:
    def forward(model: Any, images: Tensor, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(pixel_values=images, **kwargs).logits

    return forward
