from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DPTConfig,
    DPTForDepthEstimation,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from peft_bsr import BSRConfig, PeftBsrError, UnsupportedModelError, probe_column

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}

EXPECTED = {  # prefix tokens, head, prefix positions read, patches read
    "vit": (1, ("vit.layernorm", "classifier"), (0,), False),
    "vit_bare": (1, ("layernorm", "pooler.dense"), (0,), True),
    "deit": (2, ("deit.layernorm", "classifier"), (0,), False),
    "deit_teacher": (2, ("deit.layernorm", "cls_classifier", "distillation_classifier"), (0, 1), False),
    "vit_msn": (1, ("vit.layernorm", "classifier"), (0,), False),
    "dinov2": (1, ("dinov2.layernorm", "classifier"), (0,), True),
    "dinov2_registers": (4, ("dinov2_with_registers.layernorm", "classifier"), (0,), True),
    "clip": (1, ("classifier",), (), True),
    "clip_bare": (1, ("post_layernorm",), (0,), True),
}


def test_column_of_every_family(family, make_model):
    column = probe_column(make_model(family))
    assert (column.num_prefix, column.head, column.reads_prefix, column.reads_patches) == EXPECTED[family]
    assert (column.depth, column.width, column.grid, column.patch_size) == (4, 32, (4, 4), (8, 8))
    assert column.num_tokens == column.num_prefix + 16


def test_probing_leaves_no_trace(family, make_model):
    model = make_model(family).train()
    first = next(model.children())
    first.eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    probe_column(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_frozen_model_is_probed_alike(make_model):
    assert probe_column(make_model().requires_grad_(False)) == probe_column(make_model())


def test_half_precision_models_are_probed_alike(make_model):
    assert probe_column(make_model().bfloat16()) == probe_column(make_model())


REFUSED = {
    "DINOv3 (rotary positions)": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES)), "position tables"),
    "BEiT (relative bias)": (
        lambda: BeitForImageClassification(BeitConfig(**SIZES, use_relative_position_bias=True)),
        "biases",
    ),
    "Swin (windows)": (
        lambda: SwinForImageClassification(
            SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
        ),
        "one list of equal blocks",
    ),
    "VideoMAE (video)": (lambda: VideoMAEForVideoClassification(VideoMAEConfig(**SIZES)), "forward pass"),
    "YOLOS (tokens behind the patches)": (
        lambda: YolosForObjectDetection(YolosConfig(**{**SIZES, "image_size": [32, 32]}, num_detection_tokens=3)),
        "sit behind the patches",
    ),
    "BERT (text)": (
        lambda: BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=30)
        ),
        "",
    ),
    "a convolutional network": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "one list of equal blocks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_with_the_reason_and_what_is_supported(name):
    make, reason = REFUSED[name]
    model = make().eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError) as caught:
        probe_column(model)
    assert reason in str(caught.value)
    assert "Supported are plain vision transformers: ViT, DeiT" in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)), "no class token"),
        (
            lambda: DPTForDepthEstimation(
                DPTConfig(
                    **SIZES,
                    is_hybrid=False,
                    backbone_out_indices=[0, 1, 2, 3],
                    neck_hidden_sizes=[8, 8, 8, 8],
                    fusion_hidden_size=8,
                )
            ),
            "not norm, attention, norm, MLP",
        ),
    ],
    ids=["SigLIP", "DPT"],
)
def test_models_that_cannot_drop_tokens_are_refused_at_injection(make, reason):
    from peft import get_peft_model

    model = make().eval()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(PeftBsrError, match=reason):
        get_peft_model(model, BSRConfig())
    assert [type(module) for module in model.modules()] == classes


def test_weights_on_the_meta_device_are_refused(make_model):
    with pytest.raises(UnsupportedModelError, match="meta device"):
        probe_column(make_model().to("meta"))
