"""A fingerprint tells models apart that compute otherwise, and only those."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from transformers import Dinov2Config, Dinov2ForImageClassification, DINOv3ViTConfig, DINOv3ViTModel, ViTModel

from peft_bsr import BSRConfig, SynQTConfig, probe_model
from peft_bsr.backbones import Fingerprint, weights_digest
from peft_bsr.backbones.fingerprint import fingerprint
from tests.bad_input.conftest import make_vit

DINO = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
VIT = {"family": "vit", "depth": 4, "width": 32, "heads": 4, "mlp": 64, "patch": [8, 8], "prefix": 1, "suffix": 0}
VIT |= {"activation": "gelu", "eps": 1e-12, "rope": None}


def test_what_a_vit_is():
    assert fingerprint(make_vit()) == VIT
    assert fingerprint(make_vit(num_labels=7, seed=3).to(torch.bfloat16)) == VIT, "head, weights and dtype do not count"
    assert fingerprint(make_vit().vit) == VIT


def test_what_others_are():
    dinov2 = fingerprint(Dinov2ForImageClassification(Dinov2Config(**DINO, mlp_ratio=2)))
    assert (dinov2["family"], dinov2["mlp"], dinov2["eps"]) == ("dinov2", 64, 1e-6)
    dinov3 = fingerprint(DINOv3ViTModel(DINOv3ViTConfig(**DINO, intermediate_size=64, num_register_tokens=2)))
    assert (dinov3["family"], dinov3["prefix"], dinov3["rope"]) == ("dinov3_vit", 3, 100.0)


@pytest.mark.parametrize(
    "config", [BSRConfig(), BSRConfig(trainable="lora"), SynQTConfig()], ids=["bsr", "lora", "synqt"]
)
def test_an_adapter_is_no_part_of_it(config):
    model = get_peft_model(make_vit(), config)
    assert fingerprint(model, model.base_model.spec) == VIT


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": 2}, "depth 4 instead of 2"),
        ({"num_attention_heads": 2}, "heads 4 instead of 2"),
        ({"hidden_act": "relu"}, "activation 'gelu' instead of 'relu'"),
        ({"layer_norm_eps": 1e-6}, "eps 1e-12 instead of 1e-06"),
        ({"patch_size": 16}, "patch (8, 8) instead of (16, 16)"),
        ({"intermediate_size": 48}, "mlp 64 instead of 48"),
    ],
)
def test_what_differs_is_told_with_both_values(settings, words):
    assert Fingerprint.of(make_vit()).differences(Fingerprint.of(make_vit(**settings))) == [words]


def test_it_goes_through_json_and_what_is_not_known_agrees():
    found = Fingerprint.of(make_vit())
    assert Fingerprint.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert Fingerprint.from_dict({"depth": 4, "moons": 2}).differences(found) == []


def test_the_digest_is_of_the_weights_before_the_head():
    model = make_vit()
    spec = probe_model(model)
    digest = weights_digest(model, spec)
    assert digest == weights_digest(make_vit(num_labels=7), spec) == weights_digest(make_vit().bfloat16(), spec)
    assert digest != weights_digest(make_vit(seed=1), spec)
    assert weights_digest(make_vit().half(), spec) is None
    with torch.device("meta"):
        assert weights_digest(ViTModel(model.config), spec) is None
