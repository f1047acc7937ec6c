"""All tokens run forward as ever, and gradients are those of a literal reference in which the others are detached."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_bsr import BSRConfig, ConfigError
from peft_bsr.cost import saved_activations

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))

from gradient_tokens import loss_with_gradients_of_some

LABELS = torch.tensor([0, 2])
NONE = {"reduction_blocks": []}


def attach(base, **settings):
    return get_peft_model(base, BSRConfig(**{"trainable_blocks": [1, 2, 3], **NONE, **settings})).train()


def step(model, images):
    """Loss and gradients by name."""
    model.zero_grad()
    loss = model(pixel_values=images, labels=LABELS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[n] - v).abs().max() / v.abs().max().clamp_min(1e-3)) for n, v in expected.items())


@pytest.mark.parametrize("lean", ["off", "exact", "max"])
@pytest.mark.parametrize(
    ("first", "keep_rates"), [(1, {}), (0, {}), (1, {2: 0.6}), (1, {0: 0.7, 1: 0.5})], ids=str
)
def test_gradients_are_those_of_the_literal_reference(lean, first, keep_rates, make_model, images):
    base = make_model("vit").double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in base.named_parameters()}
    embedded = base.vit.embeddings(images.double()).detach()
    expected = loss_with_gradients_of_some(weights, embedded, LABELS, 4, 1e-12, first, 0.4, keep_rates)
    expected.backward()
    settings = {"reduction_blocks": [*keep_rates], "keep_rate": [*keep_rates.values()] or 1.0, "fuse_dropped": False}
    blocks = [i for i in (0, 1, 2, 3) if i >= first]
    model = attach(base, trainable_blocks=blocks, gradient_tokens=0.4, lean=lean, **settings)
    loss, gradients = step(model, images.double())
    assert abs(loss - expected) < 1e-12
    names = {n.removeprefix("base_model.model.").replace(".bsr_params.default", ""): g for n, g in gradients.items()}
    assert distance(names, {n: weights[n].grad for n in names}) < 1e-8
    assert len(names) == 4 + 16 * len(blocks)


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("reduction_blocks", [[], [1, 3]], ids=str)
def test_the_forward_is_the_ordinary_one_to_the_last_digit(trainable, reduction_blocks, make_model, images):
    for lean in ("off", "exact", "max"):
        settings = {"trainable": trainable, "reduction_blocks": reduction_blocks, "lean": lean, "keep_rate": 0.6}
        models = [attach(make_model("vit"), gradient_tokens=share, **settings) for share in (1.0, 0.5)]
        (loss, gradients), (same, others) = (step(model, images) for model in models)
        assert torch.equal(loss, same)
        assert gradients.keys() == others.keys()
        assert distance(others, gradients) > 1e-3
        outputs = [model.eval()(pixel_values=images).logits for model in models]
        assert torch.equal(*outputs)
