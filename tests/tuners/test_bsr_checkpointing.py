"""Gradient checkpointing, both kinds, however it is switched on; and input gradients, however they are asked for."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_bsr import BSRConfig
from peft_bsr.cost import saved_activations

pytestmark = pytest.mark.sampled(2)

KINDS = [None, False, True]


def gradients(model, *batches) -> dict[str, torch.Tensor]:
    """Several forwards before one backward: a recomputation must not see the latest one's tokens."""
    model.train()
    sum(model(pixel_values=images).logits.square().sum() for images in batches).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def build(make_vit, make_config, use_reentrant: bool | None, when: str = "after"):
    torch.manual_seed(0)
    vit, config = make_vit(), make_config(trainable_blocks=[2, 3], reduction_blocks=[0, 2, 3])
    arguments = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if use_reentrant is not None and when == "before":
        vit.gradient_checkpointing_enable(**arguments)
    torch.manual_seed(0)  # the adapters' random start
    model = get_peft_model(vit, config)
    if use_reentrant is not None and when == "after":
        model.base_model.model.gradient_checkpointing_enable(**arguments)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same(make_vit, make_config, images, use_reentrant, when):
    batches = (images, images.flip(-1) * 3)
    expected = gradients(build(make_vit, make_config, None), *batches)
    found = gradients(build(make_vit, make_config, use_reentrant, when), *batches)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_wrapper_around_a_block_checkpoints_it(make_vit, images):
    """Accelerate's (for FSDP) calls the block again outside of the forward: for the same tokens, and not in int8."""
    found = []
    for kept in ("full", "int8"):
        config = BSRConfig(trainable_blocks=[2, 3], keep_rate=1.0, saved_activations=kept)
        model = get_peft_model(make_vit(), config)
        layers = model.get_base_model().vit.layers
        if kept == "int8":
            layers[2], layers[3] = map(checkpoint_wrapper, layers[2:])
        found.append(list(gradients(model, images).values()))
    for wrapped, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(wrapped, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", KINDS)
def test_input_gradients_cost_nothing(make_vit, make_config, images, use_reentrant):
    counts = []
    for enable in (False, True):
        model = build(make_vit, make_config, use_reentrant).train()
        if enable:
            model.enable_input_require_grads()
        counts.append(saved_activations(model, lambda model=model: model(pixel_values=images).logits.sum()))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_saves_memory(make_vit, make_config, images, use_reentrant):
    def saved(kind: bool | None) -> int:
        model = build(make_vit, make_config, kind).train()
        return saved_activations(model, lambda: model(pixel_values=images).logits.sum())

    assert saved(use_reentrant) < 0.5 * saved(None)


def test_leading_blocks_are_not_checkpointed(make_vit, make_config, images, recwarn):
    model = build(make_vit, make_config, True)
    layers = model.base_model.model.vit.layers
    assert [layer.gradient_checkpointing for layer in layers] == [False, False, True, True]
    gradients(model, images)
    assert not [w for w in recwarn if "None of the inputs have requires_grad" in str(w.message)]
    with model.disable_adapter():
        assert [layer.gradient_checkpointing for layer in layers] == [True] * 4
    assert [layer.gradient_checkpointing for layer in model.unload().vit.layers] == [True] * 4


def test_checkpointing_can_be_switched_off_again(make_vit, make_config, images):
    expected = gradients(build(make_vit, make_config, None), images)
    model = build(make_vit, make_config, True)
    model.base_model.model.gradient_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in model.base_model.model.vit.layers)
    found = gradients(model, images)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
