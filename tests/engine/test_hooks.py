"""A user's hook sees in training what it sees on the stock model, and `explain()` says why a half is not lean."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_bsr import BSRConfig
from peft_bsr.cost import saved_activations
from peft_bsr.errors import LeanBlockWarning

pytestmark = pytest.mark.sampled(2)

PLACES = [
    "vit",
    "vit.layers.3",
    "vit.layers.3.layernorm_before",
    "vit.layers.3.attention",
    "vit.layers.3.attention.q_proj",
    "vit.layers.3.attention.o_proj",
    "vit.layers.3.layernorm_after",
    "vit.layers.3.mlp",
    "vit.layers.3.mlp.fc1",
    "vit.layers.3.mlp.activation_fn",
    "vit.layers.3.dropout",
    "vit.layers.1.mlp.fc2",
    "vit.layers.2.attention.k_proj",
    "vit.layernorm",
]


def build(make_model, lean, trainable="full"):
    config = BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[2], lean=lean, trainable=trainable)
    torch.manual_seed(0)
    return get_peft_model(make_model(), config).train()


def first_tensor(value):
    if isinstance(value, torch.Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value
    return next(t for t in values if isinstance(t, torch.Tensor))


def watch(model, place, seen):
    """A hook of each kind on a module."""
    module = model.base_model.model.get_submodule(place)
    return [
        module.register_forward_hook(lambda m, a, out: seen.append(("out", first_tensor(out).detach().clone()))),
        module.register_forward_pre_hook(
            lambda m, a, kw: seen.append(("in", first_tensor([*a, *kw.values()]).detach().clone())), with_kwargs=True
        ),
        module.register_full_backward_hook(
            lambda m, grads_in, grads_out: seen.append(("grad", first_tensor(grads_out).clone()))
        ),
    ]


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("lean", ["exact", "max"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_see_what_they_would(place, lean, trainable, make_model, images):
    found = []
    for level in ("off", lean):
        model, seen = build(make_model, level, trainable), []
        watch(model, place, seen)
        model(pixel_values=images).logits.square().sum().backward()
        found.append(seen)
    stock, other = found
    assert [(kind, t.shape) for kind, t in stock] == [(kind, t.shape) for kind, t in other]
    assert {kind for kind, _ in stock} >= {"in", "out"}
    for (kind, expected), (_, value) in zip(stock, other, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5, msg=kind)


@pytest.mark.parametrize("place", ["vit.layers.3.mlp.fc1", "vit.layers.1.attention", "vit.layers.3"])
def test_a_hook_may_come_and_go(place, make_model, images):
    model = build(make_model, "exact")

    def saved():
        return saved_activations(model, lambda: model(pixel_values=images).logits.sum())

    before = saved()
    assert "hook" not in model.base_model.explain()
    handles = watch(model, place, [])
    is_block = place == "vit.layers.3"  # a hook on the block itself does not concern its halves
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        more = saved()
        assert saved() == more
    assert [w.category for w in given if issubclass(w.category, LeanBlockWarning)] == [LeanBlockWarning] * (
        not is_block
    )
    assert more > before
    does = "reads its output" if is_block else "looks at its modules"
    assert f"the hook watch.<locals>.<lambda> {does}" in model.base_model.explain()
    for handle in handles:
        handle.remove()
    assert saved() == before
    assert "hook" not in model.base_model.explain()


def test_hooks_before_the_blocks_do_not_count(make_model, images):
    model = build(make_model, "exact")
    before = saved_activations(model, lambda: model(pixel_values=images).logits.sum())
    model.enable_input_require_grads()
    assert saved_activations(model, lambda: model(pixel_values=images).logits.sum()) == before


def test_captured_hidden_states_are_whole(make_model, images):
    states = []
    for lean in ("off", "exact"):
        model = build(make_model, lean)
        before = saved_activations(model, lambda m=model: m(pixel_values=images).logits.sum())
        states.append(model(pixel_values=images, output_hidden_states=True).hidden_states)
        # transformers' hooks for captured outputs stay registered
        assert saved_activations(model, lambda m=model: m(pixel_values=images).logits.sum()) == before
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.LeanBlockWarning")
def test_a_module_that_is_replaced_is_looked_up_again(make_model, images):
    found = []
    for lean in ("off", "exact"):
        model = build(make_model, lean)
        model(pixel_values=images)
        torch.manual_seed(1)
        mlp = model.base_model.model.vit.layers[2].mlp
        mlp.fc1 = nn.Linear(32, 64)
        mlp.activation_fn = nn.SiLU()
        outputs = model(pixel_values=images).logits
        mlp.activation_fn = nn.Softplus()
        odd = model(pixel_values=images).logits
        (outputs.sum() + odd.sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([outputs, odd, *gradients])
        if lean == "exact":
            assert "the derivative of Softplus is not known" in model.base_model.explain()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_adapters_that_are_switched_are_looked_up_again(make_model, images):
    found = []
    for lean in ("off", "exact"):
        model = build(make_model, lean)
        config = BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[2], lean=lean, init_weights=False)
        torch.manual_seed(2)
        model.add_adapter("other", config)
        values = []
        for step in ("default", "other", "merged", "default"):
            if step == "merged":
                model.merge_adapter(["other"])
            else:
                model.base_model.unmerge_adapter() if model.base_model.model.vit.layers[1].mlp.fc1.merged else None
                model.set_adapter(step)
            values.append(model(pixel_values=images).logits)
            with model.disable_adapter():
                values.append(model(pixel_values=images).logits)
            model.set_adapter("other" if step == "merged" else step)
        found.append(values)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_explain_says_what_is_planned_and_what_is_not(make_model):
    text = build(make_model, "max").base_model.explain()
    assert "    0  frozen, outside of the graph" in text
    assert "    3  trained, attention and MLP lean (max), for the first 1 tokens only" in text
    model = build(make_model, "off")
    with model.disable_adapter():
        assert model.base_model.explain().startswith("No plan is active")
