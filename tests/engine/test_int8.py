"""Saved activations in 8 bits: what is packed, how well, and what is left alone."""

from __future__ import annotations

import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.backbones import tensors_of
from peft_bsr.cost import saved_activations
from peft_bsr.engine.int8 import saved_in_int8, watch_kept
from peft_bsr.ops import PackedTensor

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from families import SUPPORTED, run_batch

pytestmark = pytest.mark.sampled(2)

FAMILIES = ["vit", "clip", "siglip", "dinov2", "dinov3", "beit", "vivit"]


@contextmanager
def collected():
    found: list[torch.Tensor] = []
    with watch_kept(found.append):
        yield found


def codes(kept: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in kept if tensor.dtype == torch.uint8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 100.0, -3.0])
def test_numbers_come_back_within_a_step(dtype, shift):
    numbers = (torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) + shift).to(dtype)
    packed = PackedTensor.of(numbers)
    found = packed.unpack().view(50, 32)
    width = numbers.float().amax(1) - numbers.float().amin(1) + numbers.float().abs().amax(1) * 2**-6
    rounding = torch.finfo(dtype).eps * numbers.abs().max() if dtype != torch.float32 else 1e-5
    assert found.dtype == dtype
    assert ((found.float() - numbers.float()).abs().amax(1) <= width / 255 * 1.02 + rounding).all()
    assert sum(t.nbytes for t in (packed.codes, packed.smallest, packed.step)) == 50 * (32 + 2 * 2)


def test_rounding_has_no_bias():
    numbers = torch.rand(1, 32, generator=torch.Generator().manual_seed(0)).repeat(20_000, 1)
    mean = PackedTensor.of(numbers).unpack().view(-1, 32).mean(0)
    assert (mean - numbers[0]).abs().max() < 5 / 255 / math.sqrt(20_000)


def test_equal_numbers_and_numbers_that_are_none():
    assert (PackedTensor.of(torch.zeros(2, 32)).unpack() == 0).all()
    torch.testing.assert_close(
        PackedTensor.of(torch.full((2, 32), 7.3)).unpack(), torch.full((64,), 7.3), atol=0.06, rtol=0
    )
    assert PackedTensor.of(torch.full((2, 32), math.nan)).unpack().isnan().all()


def test_a_tensor_is_packed_once_per_version_and_its_views_share():
    tokens = torch.randn(2, 9, 64, requires_grad=True)
    with saved_in_int8(nn.Identity(), 1, ()), collected() as packed:
        hidden = tokens * 1.0
        _ = hidden * hidden
        _ = hidden.transpose(1, 2).exp().reshape(-1) @ hidden.view(-1)
        assert len(codes(packed)) == 2 + 1  # hidden and the exponential, which is packed as result and as a copy of it
        with torch.no_grad():
            hidden.add_(1)
        _ = hidden.square()
    assert len(codes(packed)) == 4


def test_the_address_of_a_freed_tensor_is_not_taken_for_it():
    weight = nn.Parameter(torch.ones(64))
    with saved_in_int8(nn.Identity(), 1, ()):
        outputs = []
        for i in range(20):  # the allocator uses the same address again
            outputs.append((torch.full((4, 64), float(i)) * weight).sum())
    gradients = [float(torch.autograd.grad(output, weight)[0].mean()) for output in outputs]
    assert gradients == pytest.approx([4.0 * i for i in range(20)], abs=4 * 20 * 2**-7)


def test_what_is_not_an_activation_is_left_alone():
    layer = nn.Linear(64, 64)
    mask = torch.randn(1, 1, 9, 64)
    tokens = torch.randn(2, 9, 64, requires_grad=True)
    with saved_in_int8(layer, tokens.numel(), {"mask": (mask,)}), collected() as packed:
        hidden = layer(tokens)
        outputs = [hidden.square(), hidden * mask, hidden.mean(-1).exp(), hidden.sort(-1).values]
        outputs.append(torch.softmax(torch.randn(2, 64, 64, requires_grad=True), -1))
    shapes = sorted(p.numel() for p in codes(packed))
    assert shapes == [hidden.numel(), tokens.numel()] and len(outputs) == 5


def gradients_of(family: str, saved_activations: str, **settings: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    config = {"trainable_blocks": [1, 3], "reduction_blocks": [0, 1, 2], "keep_rate": 0.7, **settings}
    model = get_peft_model(SUPPORTED[family](), BSRConfig(saved_activations=saved_activations, **config)).train()
    assert all(b.int8 == (saved_activations == "int8") for b in model.base_model.plan().blocks[1:])
    batch = run_batch(model.base_model.model)
    for module in model.modules():  # rounding draws from the generator that drops paths
        module.training &= (
            "Drop" not in type(module).__name__
        )  # paths dropped by the generator that rounding draws from
    sum(t.float().square().mean() for t in tensors_of(model(**batch)) if t.requires_grad).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("lean", ["off", "exact", "max"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_are_near(family, lean):
    expected = gradients_of(family, "full", lean="off")
    found = gradients_of(family, "int8", lean=lean)
    error = math.sqrt(sum(float((found[n] - expected[n]).square().sum()) for n in expected))
    size = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert 0 < error <= 0.02 * size


def vit(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, image_size=64, patch_size=8
    )
    return get_peft_model(ViTForImageClassification(config), BSRConfig(trainable_blocks=[1, 3], **settings)).train()


BATCH = {"pixel_values": torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("lean", ["off", "exact", "max"])
def test_the_counter_sees_what_is_packed(lean):
    counts = [
        saved_activations(model := vit(lean=lean, saved_activations=kind), lambda m=model: m(**BATCH).logits.sum())
        for kind in ("full", "int8")
    ]
    assert 0.25 < counts[1] / counts[0] < 0.36


def test_inside_checkpointing_nothing_is_packed():
    model = vit(saved_activations="int8")
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    with collected() as packed:
        model(**BATCH).logits.sum().backward()
    assert not packed
    expected = vit()
    expected(**BATCH).logits.sum().backward()
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_evaluation_packs_nothing_and_outputs_do_not_change():
    model, stock = vit(saved_activations="int8"), vit()
    assert torch.equal(model(**BATCH).logits, stock(**BATCH).logits)
    with collected() as packed, torch.no_grad():
        assert torch.equal(model.eval()(**BATCH).logits, stock.eval()(**BATCH).logits)
        model.eval()(**BATCH)
    assert not packed


def test_autocast_packs_activations_and_no_weights():
    model = vit(saved_activations="int8", lean="off")
    expected = vit(lean="off")
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for each in (model, expected):
        with torch.autocast("cpu", torch.bfloat16), collected() as packed:
            loss = each(pixel_values=images).logits.float().sum()
        loss.backward()
        assert (len(codes(packed)) > 10) == (each is model)
        assert all(p.numel() % 5 == 0 for p in codes(packed))  # of five images; no weight's shape is
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        if a.grad is not None and not name.endswith("k_proj.bsr_params.default.bias"):
            assert (a.grad - b.grad).norm() <= 0.05 * b.grad.norm(), name


@pytest.mark.parametrize("family", ["ViT", "DINOv3"])
def test_as_many_tokens_as_a_head_is_wide_are_packed_too(family):
    """Queries, keys and values have the shape of attention weights then, and are told apart by their role."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    torch.manual_seed(0)
    if family == "ViT":
        base = ViTForImageClassification(ViTConfig(**sizes, image_size=(56, 72), patch_size=8, num_labels=3))
        images = torch.randn(2, 3, 56, 72)  # 63 patches and the class token
    else:
        config = DINOv3ViTConfig(**sizes, image_size=64, patch_size=8, num_register_tokens=0)
        base, images = DINOv3ViTModel(config), torch.randn(2, 3, 56, 72)
    model = get_peft_model(base, BSRConfig(trainable_blocks=[0], keep_rate=1.0, saved_activations="int8")).train()
    with collected() as kept:
        tensors_of(model(pixel_values=images))[0].sum()
    assert len(codes(kept)) >= 10
    assert not [t.shape for t in kept if t.is_floating_point() and t.shape[-2:] == (64, 64) and t.shape[0] == 2]
