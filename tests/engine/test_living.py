"""The bytes alive after a forward are those reported as kept for backward."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig
from peft_bsr.cost import saved_activations
from peft_bsr.engine import LivingBytes

pytestmark = pytest.mark.sampled(2)

SIZES = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 384}
SIZES |= {"image_size": 80, "patch_size": 8}  # 101 tokens
CONFIGS = {
    **{
        f"{trainable} {lean} {saved}": BSRConfig(trainable=trainable, lean=lean, saved_activations=saved)
        for trainable in ("full", "lora")
        for lean in ("off", "exact", "max")
        for saved in ("full", "int8")
    },
    **{  # with fixed budgets, because each forward is a step
        f"alast {lean} {saved}": ALaSTConfig(alpha=0.0, lean=lean, saved_activations=saved)
        for lean in ("off", "exact", "max")
        for saved in ("full", "int8")
    },
    **{f"synqt {kept}": SynQTConfig(kept_tokens=kept) for kept in ("full", "bfloat16", "float16", "int8")},
    "frozen weights in int8": BSRConfig(frozen_weights="int8"),
    "every token": BSRConfig(trainable_blocks="every:1", keep_rate=1.0),
    "after the block": BSRConfig(reduce_at="after_block"),
}


def reported_and_living(config, autocast=False, mutate=None):
    """Bytes that autograd says it keeps in a forward of a ViT with the adapter, and bytes that are alive after it.

    `mutate` is called between: the test at attach would see the mutation, and leave the part out.
    """
    torch.manual_seed(0)
    model = get_peft_model(ViTForImageClassification(ViTConfig(**SIZES, num_labels=10)), config).train()
    if mutate is not None:
        mutate()
    images, labels = torch.randn(4, 3, 80, 80), torch.arange(4)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(pixel_values=images, labels=labels).loss

    reported = saved_activations(model, forward)
    with LivingBytes() as living:
        loss = forward()
    return reported, living.bytes(exclude=[loss])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_lives_is_what_is_reported(name, autocast):
    if "weights" in name:
        pytest.importorskip("torchao", reason="torchao is not installed")
    reported, living = reported_and_living(CONFIGS[name], autocast)
    assert reported > 200_000  # so that small tensors do not matter
    assert living == pytest.approx(reported, rel=0.02)


@pytest.mark.parametrize("lean", ["off", "exact", "max"])
def test_packing_that_also_keeps_the_original_is_seen(lean, monkeypatch):
    """A mutation of `saved_activations="int8"`, made where every such packing has to pass."""
    config = BSRConfig(lean=lean, saved_activations="int8")
    before, _ = reported_and_living(config)
    hooks = torch.autograd.graph.saved_tensors_hooks

    class Keeping(hooks):
        def __init__(self, pack, unpack):
            super().__init__(lambda tensor: (pack(tensor), tensor), lambda packed: unpack(packed[0]))

    def mutate():
        monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Keeping)

    reported, living = reported_and_living(config, mutate=mutate)
    assert reported == before, "the counter believes what it is told"
    assert living > 1.5 * reported


@pytest.mark.parametrize("settings", [{"lean": "exact"}, {"lean": "max"}, {"lean": "exact", "trainable": "lora"}])
def test_a_lean_function_that_keeps_its_inputs_on_ctx_is_seen(settings, monkeypatch):
    """A mutation of the lean functions: `ctx` holds what `forward` had at hand, such as the inputs of the Linears."""
    before, _ = reported_and_living(BSRConfig(**settings))
    save = torch.autograd.function.FunctionCtx.save_for_backward

    def save_and_keep(ctx, *tensors):
        save(ctx, *tensors)
        ctx.at_hand = [value for value in sys._getframe(1).f_locals.values() if isinstance(value, torch.Tensor)]

    def mutate():
        monkeypatch.setattr(torch.autograd.function.FunctionCtx, "save_for_backward", save_and_keep)

    reported, living = reported_and_living(BSRConfig(**settings), mutate=mutate)
    assert reported == before, "the counter believes what it is told"
    assert living > 1.05 * reported


class Holder(torch.autograd.Function):
    """Keeps 4 times its input next to what it saves."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.held = x.repeat(4)
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def test_whoever_holds_it_is_seen():
    x = torch.ones(256, requires_grad=True)
    with LivingBytes() as living:
        loss = Holder.apply(x * 1)
    assert living.bytes() == (1 + 4) * 1024 + 4
    assert living.bytes(exclude=[loss]) == (1 + 4) * 1024
    loss.backward()
    del loss
    assert living.bytes(exclude=[x.grad]) == 0


def test_what_was_there_before_does_not_count_and_views_count_whole():
    layer, x = nn.Linear(256, 256), torch.ones(4, 256)
    with LivingBytes() as living:
        old = [layer.weight.T, x.view(-1)[:3], layer.weight.detach().add_(1)]
        new = torch.zeros(256)[3:5]
        constant = torch.tensor([1.0, 2.0])
    assert living.bytes() == 1024 + 8
    del old, new, constant
    assert living.bytes() == 0


def test_a_new_storage_at_the_address_of_a_freed_one_counts():
    with LivingBytes() as living:
        for _ in range(50):
            torch.zeros(256)
        kept = [torch.zeros(256) for _ in range(50)]
        cycle = [torch.zeros(256)]
        cycle.append(cycle)
        del cycle
    assert living.bytes() == 50 * 1024
    kept.clear()
    assert living.bytes() == 0


def test_of_a_wrapper_the_inner_tensors_count():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    layer = nn.Linear(256, 256, bias=False)
    with LivingBytes() as living:
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    assert 256 * 256 <= living.bytes() < 256 * 256 * 1.1
    with LivingBytes() as living:
        output = layer(torch.ones(2, 256))
    assert living.bytes(exclude=[output]) == 0


@pytest.mark.parametrize("settings", [{"lean": "exact"}, {"lean": "max"}])
def test_the_test_at_attach_sees_what_ctx_keeps(settings, monkeypatch):
    """The self-test also counts living bytes: such a half runs stock, with the reason."""
    save = torch.autograd.function.FunctionCtx.save_for_backward

    def save_and_keep(ctx, *tensors):
        save(ctx, *tensors)
        ctx.at_hand = [torch.ones(2**20)]

    monkeypatch.setattr(torch.autograd.function.FunctionCtx, "save_for_backward", save_and_keep)
    plan = get_peft_model(ViTForImageClassification(ViTConfig(**SIZES)), BSRConfig(**settings)).base_model.plan()
    assert all(block.lean is None for block in plan.blocks)
    assert any("does not save less for backward" in note for note in plan.notes)
