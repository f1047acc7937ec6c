"""Three tiny models with an adapter each, and their files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
CONFIGS = {
    "bsr": BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1], init_weights=False),
    "lora": BSRConfig(trainable_blocks=[1, 3], trainable="lora", r=4, init_weights=False),
    "tasks": BSRConfig(trainable_blocks=[3], tasks={"zoo": 5, "digits": 4}),
    "alast": ALaSTConfig(trainable_blocks_per_step=2),
    "synqt": SynQTConfig(layers=[1, 3]),
}


def make_vit(depth: int = 4, num_labels: int = 3, seed: int = 0, **settings: Any) -> ViTForImageClassification:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ViTConfig(num_hidden_layers=depth, num_labels=num_labels, **{**TINY, **settings})
        return ViTForImageClassification(config).eval()


def make_adapter(method: str) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(make_vit(), copy.deepcopy(CONFIGS[method])).eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a saved adapter of each method; not to be changed."""
    folders: dict[str, Path] = {}

    def folder_of(method: str) -> Path:
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp(method)
            make_adapter(method).save_pretrained(folders[method])
        return folders[method]

    return folder_of


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a refused call must leave bit for bit."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {
            name: (
                type(m),
                m.training,
                sorted(key for key in vars(m) if not key.startswith("_")),
                *(len(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)),
            )
            for name, m in model.named_modules()
        },
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["modules"] == expected["modules"]
    assert found["requires_grad"] == expected["requires_grad"]
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        assert torch.equal(found["weights"][name].nan_to_num(), tensor.nan_to_num()), name
