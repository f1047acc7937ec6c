"""Dense heads around a backbone, and heads of one's own: attached, trained in all parts, saved with the head."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)

import peft_bsr
from peft_bsr import BSRConfig, UnsupportedModelError, probe_model, verify_trainability
from peft_bsr.cost import estimate
from tests.conftest import SIZES

FUSION = {"patch_size": 8, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}


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
    with pytest.raises(UnsupportedModelError) as caught:
        get_peft_model(model, BSRConfig())
    line = "model.encoder = get_peft_model(model.encoder, BSRConfig())"
    assert f"`{line}`" in str(caught.value)
    exec(line, {"model": model, "get_peft_model": get_peft_model, "BSRConfig": BSRConfig})
    model(images).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("layers.3" in name for name in trained) and "head.weight" in trained


def test_an_outer_size_does_not_count():
    model = HEADS["dpt"]()
    model.config.image_size, model.config.num_hidden_layers = 999, 99
    assert probe_model(model).depth == 24
