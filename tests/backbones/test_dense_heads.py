"""Dense heads around a backbone, and heads of one's own: attached, trained in all parts, saved with the head."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    CLIPConfig,
    CLIPModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTForSemanticSegmentation,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)

import peft_bsr
from peft_bsr import BSRConfig, UnsupportedModelError, probe_model, verify_trainability
from peft_bsr.backbones import tensors_of
from peft_bsr.cost import estimate
from tests.conftest import SIZES, TEXT

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from families import NO_REDUCTION, run_batch

FUSION = {"patch_size": 8, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
POSE = {name: size for name, size in SIZES.items() if name not in ("image_size", "patch_size", "intermediate_size")}


def dinov2(depth: int = 4, **more) -> Dinov2Config:
    indices = [depth // 4, depth // 2, 3 * depth // 4, depth]
    sizes = {**SIZES, "num_hidden_layers": depth}
    return Dinov2Config(**sizes, mlp_ratio=2, out_indices=indices, **more)


def upernet(backbone) -> nn.Module:
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 16, "num_labels": 3}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes))


HEADS = {
    "dpt": lambda: DPTForDepthEstimation(
        DPTConfig(backbone_config=dinov2(24, reshape_hidden_states=False), hidden_size=32, **FUSION)
    ),
    "depth_anything": lambda: DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=dinov2(8, reshape_hidden_states=False),
            reassemble_hidden_size=32,
            head_hidden_size=8,
            **FUSION,
        )
    ),
    "upernet_dinov2": lambda: upernet(dinov2()),
    "upernet_beit": lambda: upernet(BeitConfig(**SIZES, out_features=[f"stage{i}" for i in (1, 2, 3, 4)])),
    "vitpose": lambda: VitPoseForPoseEstimation(
        VitPoseConfig(
            backbone_config=VitPoseBackboneConfig(
                **{**POSE, "num_hidden_layers": 3}, mlp_ratio=2, out_indices=[3], image_size=[32, 24], patch_size=[8, 8]
            ),
            num_labels=5,
        )
    ),
    "beit": lambda: BeitForSemanticSegmentation(BeitConfig(**SIZES, out_indices=[1, 2, 3, 4], num_labels=3)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_dense_head_trains_with_the_blocks_asked_for(name):
    torch.manual_seed(0)
    model = get_peft_model(HEADS[name](), BSRConfig(trainable_blocks=[0, 2], reduction_blocks=[1]))
    assert model.base_model.plan().mode == "full_view"
    assert model.base_model.spec.reads_patches
    verify_trainability(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def test_a_head_of_another_size_comes_back(tmp_path, images):
    HEADS["beit"]().save_pretrained(tmp_path / "base")
    base = BeitForSemanticSegmentation.from_pretrained(
        tmp_path / "base", id2label={i: f"c{i}" for i in range(5)}, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, BSRConfig(trainable_blocks=[1])).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_bsr.load(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=images).logits, model(pixel_values=images).logits)
    assert loaded.config.id2label[4] == "c4"


def test_costs_of_a_dense_head_are_estimated():
    assert estimate(HEADS["upernet_dinov2"](), BSRConfig(trainable_blocks=[2]), batch_size=2).total_bytes > 0


@pytest.mark.parametrize("name", ["depth_anything", "upernet"])
def test_costs_of_a_head_that_names_the_width_again_are_estimated(name):
    """The narrow copy has 8 channels a head; what the config names beside the backbone's width has to follow."""
    backbone = dinov2(reshape_hidden_states=name == "upernet")
    backbone.hidden_size = 48
    if name == "upernet":
        sizes = {"hidden_size": 16, "auxiliary_in_channels": 48, "auxiliary_channels": 16}
        model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **sizes))
    else:
        sizes = {"reassemble_hidden_size": 48, "head_hidden_size": 8, **FUSION}
        model = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone, **sizes))
    assert estimate(model, BSRConfig(trainable_blocks=[2]), batch_size=2).total_bytes > 0


class Own(nn.Module):
    """A head of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)
        self.head = nn.Linear(32, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(pixel_values=images).last_hidden_state[:, 0])


def test_a_module_of_ones_own_is_told_where_to_attach(images):
    model = Own()
    with pytest.raises(UnsupportedModelError, match=r"`BSRConfig\(part='encoder'\)`"):
        get_peft_model(model, BSRConfig())  # not by itself: it would freeze a head that may be new
    model = get_peft_model(model, BSRConfig(part="encoder", modules_to_save=["head"]))
    model(images).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("layers.3" in name for name in trained)
    assert "base_model.model.head.modules_to_save.default.weight" in trained


@pytest.mark.parametrize("name", [name for name in HEADS if name != "beit"])
def test_outer_sizes_do_not_count(name):
    model = HEADS[name]()
    inner = model.config.backbone_config
    for outer in ("image_size", "num_hidden_layers", "num_attention_heads", "num_channels"):
        setattr(model.config, outer, 999)
    spec = probe_model(model)
    assert (spec.depth, spec.num_heads) == (inner.num_hidden_layers, inner.num_attention_heads)
    assert spec.image_shape == (3, 32, 24 if name == "vitpose" else 32)


TWO = {"vision_config": SIZES, "text_config": {**TEXT, "num_hidden_layers": 4, "vocab_size": 50}}  # of equal depth
TWO_ENCODERS = {
    "clip": lambda: CLIPModel(CLIPConfig(**TWO)),
    "siglip": lambda: SiglipModel(SiglipConfig(**TWO)),
}


def test_the_vision_encoder_of_two_whose_images_have_any_shape_is_found_too():
    vision = {name: size for name, size in SIZES.items() if name != "image_size"} | {"num_patches": 16}
    model = get_peft_model(Siglip2Model(Siglip2Config(**{**TWO, "vision_config": vision})), BSRConfig())
    assert model.base_model.part == "vision_model"


@pytest.mark.parametrize("name", TWO_ENCODERS)
def test_the_vision_encoder_of_two_may_be_attached_to_by_itself(name, images):
    """As a PeftModel inside the larger model, so that the rest of it trains as the user says."""
    model = TWO_ENCODERS[name]()
    model.vision_model = get_peft_model(model.vision_model, BSRConfig())
    assert model.vision_model.base_model.spec.depth == 4
    model(input_ids=torch.arange(12).view(2, 6), pixel_values=images, return_loss=True).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision_model" in name and "layers.3" in name for name in trained)
    assert any("text_model" in name for name in trained), "the text encoder trains as before"


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    outputs = [t for t in tensors_of(model(**run_batch(model))) if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    sum((t.float() * torch.randn(t.shape, generator=generator)).sum() for t in outputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["maskformer", pytest.param("rt_detr_swin", marks=pytest.mark.slow)])
def test_heads_that_call_their_modules_from_a_list_train_as_in_full_fine_tuning(family):
    expected = gradients(NO_REDUCTION[family]())
    model = get_peft_model(NO_REDUCTION[family](), BSRConfig(trainable_blocks=[1], keep_rate=1.0)).eval()
    found = gradients(model)
    size = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert any("fpn.stem" in name or "class_embed" in name for name in found)
    for name, gradient in found.items():
        own = expected[name.removeprefix("base_model.model.").replace(".bsr_params.default", "")]
        assert gradient is not None, name
        torch.testing.assert_close(gradient, own, atol=1e-5 * size, rtol=1e-4, msg=name)


def test_a_backbone_config_that_the_model_does_not_use_is_not_read():
    config = DPTConfig(**SIZES, backbone_config=dinov2(8), is_hybrid=False, backbone_out_indices=[0, 1, 2, 3])
    spec = probe_model(DPTForSemanticSegmentation(config))  # it makes its blocks by its own sizes
    assert (spec.depth, spec.image_shape) == (4, (3, 32, 32))
