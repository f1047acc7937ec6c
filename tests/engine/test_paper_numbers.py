"""Numbers that a faithful implementation reproduces (ViT-B/16, DeiT-S/16, 224 px)."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.cost import count_flops, saved_activations

DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}


@pytest.fixture(scope="module")
def vit_b() -> torch.nn.Module:
    return get_peft_model(ViTForImageClassification(ViTConfig(num_labels=10)), BSRConfig())


def trainable_millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6


def test_vit_b_trains_21_27_million(vit_b):
    assert trainable_millions(vit_b) == pytest.approx(21.27, abs=0.005)


def test_deit_s_trains_5_33_million():
    deit = DeiTForImageClassification(DeiTConfig(**DEIT_S, num_labels=10))
    assert trainable_millions(get_peft_model(deit, BSRConfig())) == pytest.approx(5.33, abs=0.005)


def test_vit_b_forward_macs(vit_b):
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        macs = count_flops(lambda: vit_b(pixel_values=images)) / 2
    assert macs == pytest.approx(8.82e9, rel=0.005)


@pytest.mark.parametrize(("lean", "expected"), [("off", 22.5), ("exact", 18.3), ("max", 4.8)])
def test_vit_b_saved_activations(lean, expected):
    model = get_peft_model(ViTForImageClassification(ViTConfig(num_labels=10)), BSRConfig(lean=lean)).train()
    batch = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 1])}
    saved = saved_activations(model, lambda: model(**batch).loss) / 2 / 2**20
    assert saved == pytest.approx(expected, abs=0.3)
