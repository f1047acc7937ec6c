"""The config that a scored attention sees is the model's own in every respect but one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import get_peft_model
from transformers import PreTrainedConfig, ViTConfig

from peft_bsr import BSRConfig
from peft_bsr.backbones import ScoringConfig


@pytest.fixture
def model(make_vit):
    return get_peft_model(make_vit(), BSRConfig(trainable_blocks=[1, 3], init_weights=False)).eval()


def views_of(model):
    return [block.attention.config for block in model.get_base_model().vit.layers]


def pickled(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_is_a_config(model):
    for view in views_of(model):
        assert isinstance(view, ScoringConfig) and isinstance(view, ViTConfig) and isinstance(view, PreTrainedConfig)
        assert view == model.config and model.config == view
        assert view == views_of(model)[0] and view != ViTConfig()
        assert type(type(view)(hidden_size=8)) is ViTConfig
        assert view.to_dict() == model.config.to_dict() and repr(view) == repr(model.config)


@pytest.mark.parametrize("name", ["_attn_implementation", "attention_probs_dropout_prob", "of_the_user"])
def test_what_is_set_on_it_is_set_on_the_models_config(model, images, run, name):
    value = "eager" if name == "_attn_implementation" else 0.5
    expected = run(model, images)
    assert model.config._attn_implementation == "sdpa"
    setattr(views_of(model)[2], name, value)
    assert getattr(model.config, name) == value
    assert all(getattr(view, name) == value for view in views_of(model))
    torch.testing.assert_close(run(model, images), expected, rtol=1e-5, atol=1e-6)
    assert all(getattr(block.attention.config, name) == value for block in model.unload().vit.layers)


@pytest.mark.parametrize("made", [copy.deepcopy, pickled])
def test_copies_look_through_to_their_own_models_config(model, images, run, made):
    expected = run(model, images)
    reference = made(model)
    assert all(view.config is reference.get_base_model().vit.config for view in views_of(reference))
    assert all(view.scorer is not own.scorer for view, own in zip(views_of(reference), views_of(model), strict=True))
    reference.set_attn_implementation("eager")
    assert [view._attn_implementation for view in views_of(reference)] == ["eager"] * 4
    assert [view._attn_implementation for view in views_of(model)] == ["sdpa"] * 4
    torch.testing.assert_close(run(reference, images), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(model, images), expected)
