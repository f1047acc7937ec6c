"""Shared fixtures: tiny vision transformers, images and the two modes of BSR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.backbones import ScoringConfig

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}


@pytest.fixture
def make_vit() -> Callable[..., ViTForImageClassification]:
    """A ViT with 16 patches and 3 classes, always with the same weights."""

    def make(depth: int = 4, **settings: Any) -> ViTForImageClassification:
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(num_hidden_layers=depth, num_labels=3, **TINY, **settings)).eval()

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["full", "lora"])
def trainable(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[1.0, 0.5], ids=["keep_all", "keep_half"])
def keep_rate(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture
def make_config(trainable: str, keep_rate: float) -> Callable[..., BSRConfig]:
    """Trains blocks 1 and 3 of 4, away from the base model, so that the adapter shows in the output."""

    def make(**settings: Any) -> BSRConfig:
        defaults = {"trainable_blocks": [1, 3], "trainable": trainable, "keep_rate": keep_rate, "r": 4}
        return BSRConfig(**{**defaults, "init_weights": False, **settings})

    return make


@pytest.fixture
def model(make_vit: Callable, make_config: Callable) -> PeftModel:
    return get_peft_model(make_vit(), make_config()).eval()


@pytest.fixture
def run() -> Callable[[nn.Module, Tensor], Tensor]:
    """The model's logits, without a graph."""

    def logits(model: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(pixel_values=images).logits

    return logits


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a refused call, or a removed adapter, must leave bit for bit."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {
            name: (
                type(m),
                m.training,
                sorted(key for key in vars(m) if not key.startswith("_")),
                *(len(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)),
                id(_config_of(m)),
            )
            for name, m in model.named_modules()
        },
    }


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config.config if isinstance(config, ScoringConfig) else config  # a view: whom it shows matters, not which


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    assert after["modules"] == before["modules"]
    assert after["requires_grad"] == before["requires_grad"]
    assert list(after["weights"]) == list(before["weights"])
    torch.testing.assert_close(after["weights"], before["weights"], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Any]]:
    return state_of


@pytest.fixture
def assert_unchanged() -> Callable[[nn.Module, dict[str, Any]], None]:
    return assert_same_state
