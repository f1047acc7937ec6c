"""Three tiny models with an adapter each, and their files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig
from tests.tuners.conftest import TINY

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


def unseal(folder: Path, **values: Any) -> None:
    """Take the digests out, which see every change before other checks do, and put other settings in."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values, "digests": None}))


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
