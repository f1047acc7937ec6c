"""A user's subclass of an attention, in a file of its own, attends as its base class does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit import modeling_vit
from transformers.models.vit.modeling_vit import ViTAttention

from peft_bsr import BSRConfig, UnsupportedModelError, probe_model
from peft_bsr.compat.transformers_api import function_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


class Renamed(ViTAttention):
    """Changes nothing."""


class Counted(Renamed):
    """With a forward of its own around its base class's."""

    calls = 0

    def forward(self, *args, **kwargs):
        type(self).calls += 1
        return super().forward(*args, **kwargs)


def make(attention_class: type, implementation: str = "eager") -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(image_size=32, patch_size=8, num_labels=3, attn_implementation=implementation, **SIZES)
    model = ViTForImageClassification(config)
    for block in model.vit.layers:
        block.attention.__class__ = attention_class
    return model


def gradients(attention_class: type, lean: str) -> dict[str, torch.Tensor]:
    model = get_peft_model(make(attention_class), BSRConfig(trainable_blocks=[2, 3], lean=lean)).train()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(pixel_values=pixels).logits.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lean", ["off", "exact"])
@pytest.mark.parametrize("attention_class", [Renamed, Counted])
def test_a_subclass_trains_as_its_base_class(attention_class, lean):
    expected, found = gradients(ViTAttention, lean), gradients(attention_class, lean)
    assert list(found) == list(expected) and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert attention_class is Renamed or attention_class.calls > 0


def test_the_function_that_a_forward_uses_is_found():
    attention = make(Counted).vit.layers[0].attention
    assert function_of(attention, "eager_attention_forward") is modeling_vit.eager_attention_forward
    assert function_of(attention, "apply_rotary_pos_emb") is None
    assert function_of(copy.deepcopy(attention), "eager_attention_forward") is modeling_vit.eager_attention_forward


def my_eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class OwnFunction(nn.Module):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        projections = (self.q_proj, self.k_proj, self.v_proj)
        heads = [p(hidden_states).unflatten(2, (4, -1)).transpose(1, 2) for p in projections]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, my_eager_attention)
        output, weights = attend(self, *heads, attention_mask, scaling=self.scaling, dropout=0.0)
        return self.o_proj(output.flatten(2)), weights


def test_eager_attention_of_another_name_is_refused_with_the_reason():
    model = make(ViTAttention)
    for block in model.vit.layers:
        block.attention.__class__ = OwnFunction
    with pytest.raises(UnsupportedModelError, match=r"OwnFunction.*no function `eager_attention_forward`.*'sdpa'"):
        probe_model(model)
    model.set_attn_implementation("sdpa")
    assert probe_model(model).scores_from == "interface"
