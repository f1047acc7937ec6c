"""An adapter file saved on one layout of a model (names of modules) loads on another."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, ConfigError
from tests.bad_input.conftest import unseal

NEW_TO_OLD = {
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


class Dense(nn.Module):
    def __init__(self, inside: int, outside: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(inside, outside)
        self.activation = activation

    def forward(self, hidden_states, residual=None):
        hidden_states = self.dense(hidden_states)
        hidden_states = hidden_states if self.activation is None else self.activation(hidden_states)
        return hidden_states if residual is None else hidden_states + residual


class OldSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden_states):
        q, k, v = (
            project(hidden_states).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class OldAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = OldSelfAttention(width, heads)
        self.output = Dense(width, width)

    def forward(self, hidden_states):
        return self.output(self.attention(hidden_states))


class OldLayer(nn.Module):
    """ViT's block as transformers 4 names its parts."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = OldAttention(width, config.num_attention_heads)
        self.intermediate = Dense(width, config.intermediate_size, nn.GELU())
        self.output = Dense(config.intermediate_size, width)
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attention(self.layernorm_before(hidden_states))
        return self.output(self.intermediate(self.layernorm_after(hidden_states)), hidden_states)


class OldViT(nn.Module):
    """Takes embeddings, final norm and head from a model of the new layout."""

    def __init__(self, new: ViTForImageClassification) -> None:
        super().__init__()
        self.config = new.config
        self.vit = nn.Module()
        self.vit.embeddings = new.vit.embeddings
        self.vit.encoder = nn.Module()
        self.vit.encoder.layer = nn.ModuleList(OldLayer(new.config) for _ in new.vit.layers)
        self.vit.layernorm = new.vit.layernorm
        self.classifier = new.classifier
        self.load_state_dict({old_name(name): tensor for name, tensor in new.state_dict().items()})

    def forward(self, pixel_values):
        hidden_states = self.vit.embeddings(pixel_values)
        for block in self.vit.encoder.layer:
            hidden_states = block(hidden_states)
        return self.classifier(self.vit.layernorm(hidden_states)[:, 0])


def old_name(name: str) -> str:
    for new, old in NEW_TO_OLD.items():
        name = name.replace(new, old)
    return name


@pytest.fixture
def new(make_vit) -> ViTForImageClassification:
    return make_vit()


@pytest.fixture
def old(make_vit) -> OldViT:
    return OldViT(make_vit()).eval()


needs_key_translation = pytest.mark.skipif(
    not hasattr(__import__("peft").tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load"),
    reason="peft < 0.21 cannot translate the keys of an adapter file",
)


def test_the_two_layouts_are_one_model(new, old, images):
    torch.testing.assert_close(old(images), new(images).logits)


@pytest.mark.sampled(2)
@needs_key_translation
@pytest.mark.parametrize("to_old", [True, False])
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_a_file_loads_on_the_other_layout(make_config, new, old, images, to_old, adapter_name, tmp_path):
    source, target = (new, old) if to_old else (old, new)

    def logits(model):
        output = model(images)
        return output if isinstance(output, torch.Tensor) else output.logits

    with torch.no_grad():
        model = get_peft_model(source, make_config()).eval()
        expected = logits(model)
        model.save_pretrained(tmp_path)
        before = logits(target)
        loaded = PeftModel.from_pretrained(target, tmp_path, adapter_name).eval()
        torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(before, expected, atol=1e-3)
        loaded.save_pretrained(tmp_path / "again")  # now under the names of the target
    folder = tmp_path / "again" if adapter_name == "default" else tmp_path / "again" / adapter_name
    layout = json.loads((folder / "adapter_config.json").read_text())["layout"]
    name = "vit.encoder.layer.3.attention.attention.query" if to_old else "vit.layers.3.attention.q_proj"
    assert layout["blocks.3.attention.query"] == name


def test_keys_stay_native_so_that_transformers_can_load_the_file(new, make_config, tmp_path):
    from safetensors.torch import load_file

    get_peft_model(new, make_config(trainable_blocks=[3])).save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith(("base_model.model.vit.", "base_model.model.classifier.")) for key in keys)


@needs_key_translation
def test_a_layout_of_another_model_is_refused_before_anything_changes(make_vit, snapshot, assert_unchanged):
    config = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[3])).peft_config["default"]
    config.trainable_blocks = [2]
    vit = make_vit()
    before = snapshot(vit)
    with pytest.raises(ConfigError, match=r"`layout` names \['blocks.3.attention.key', .*set `layout=None`"):
        get_peft_model(vit, config)
    assert_unchanged(vit, before)


def test_a_nested_head_of_an_older_peft_loads_under_any_name(images, tmp_path):
    """peft 0.20 leaves the adapter's name inside the keys of a module that has modules in it."""
    from safetensors.torch import load_file, save_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4}

    def make() -> SiglipVisionModel:
        torch.manual_seed(0)
        return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8)).eval()

    model = get_peft_model(make(), BSRConfig(init_weights=False)).eval()
    expected = model(images).pooler_output
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    new_way, old_way = (
        "base_model.model.head.bsr_params.attention.",
        "base_model.model.head.bsr_params.default.attention.",
    )
    weights = load_file(path)
    new = {key.replace(old_way, new_way): tensor for key, tensor in weights.items()}
    old = {key.replace(new_way, old_way): tensor for key, tensor in new.items()}
    assert len(set(new) - set(old)) == 4
    unseal(tmp_path)
    for file in (new, old):
        save_file(file, path, {"format": "pt"})
        for name in ("default", "other"):
            loaded = PeftModel.from_pretrained(make(), tmp_path, name).eval()
            torch.testing.assert_close(loaded(images).pooler_output, expected)
