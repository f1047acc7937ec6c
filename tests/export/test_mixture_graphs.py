"""Mixtures in graphs (torch.compile, torch.export), and on a feature cache: eager's outputs, losses and gradients."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, MoEConfig
from peft_bsr.training import FeatureCache

TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class OfTask(nn.Module):
    """Images in, logits of one task out."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images, task="b").logits


@pytest.fixture(autouse=True)
def clean_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["full", pytest.param("lora", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> PeftModel:
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_hidden_layers=3, num_labels=3, **TINY))
    moe = MoEConfig(num_experts=3, top_k=2, expert_type=request.param, balance_weight=0.01)
    settings = {"trainable_blocks": [1, 2], "reduction_blocks": [0, 1], "tasks": {"a": 5, "b": 3}, "moe": moe}
    return get_peft_model(base, BSRConfig(**settings, init_weights=False)).eval()


def gradients(model: PeftModel, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_compiled_training_step(model):
    call = OfTask(model).train()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    output = compiled(IMAGES)
    found, expected = gradients(model, output), gradients(model, call(IMAGES))
    torch.testing.assert_close(output, call(IMAGES), atol=1e-5, rtol=0)
    assert set(found) == set(expected) and any(".experts." in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.slow), True])
def test_export_with_a_batch_of_any_size(model, strict):
    call = OfTask(model).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(call, (IMAGES,), dynamic_shapes=shapes, strict=strict).module()
    for images in (IMAGES, IMAGES[:3].flip(3)):  # other images, other experts
        torch.testing.assert_close(exported(images), call(images), atol=1e-5, rtol=0)


def test_a_feature_cache(model, tmp_path):
    images = [{"pixel_values": image, "labels": torch.tensor(i % 3), "task_ids": torch.tensor(i % 2)}
              for i, image in enumerate(IMAGES)]  # fmt: skip
    cache = FeatureCache.build(model, images, tmp_path / "cache", dtype=torch.float32, progress=False)
    model.train()
    expected = model(**default_collate(images)).loss
    with cache.read_by(model):
        found = model(**default_collate([cache[i] for i in range(len(cache))])).loss
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
