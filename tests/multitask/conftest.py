"""A tiny vision transformer with three tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_bsr import BSRConfig, MoEConfig
from tests.tuners.conftest import TINY, make_vit

__all__ = ["TINY", "make_vit"]
TASKS = {"zoo": 5, "digits": 4, "clothes": 3}  # not in the order of the alphabet, which files sort by


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
