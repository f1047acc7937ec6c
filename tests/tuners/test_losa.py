"""LoSA's configuration, heads of all kinds, other image sizes, its feature cache and what does not run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import peft_bsr
from peft_bsr import ConfigError, FeatureCache, InputError, LoSAConfig, set_image_size, verify_trainability
from peft_bsr.backbones import tensors_of
from peft_bsr.tuners.base.layer import find_controllers
from peft_bsr.tuners.losa.network import SideMixer

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from families import SUPPORTED, run_batch

SMALL = {"r": 4, "token_r": 3}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"r": 0}, "`r=0` must be an integer from 1 to 65536"),
        ({"token_r": 1.5}, "`token_r=1.5`"),
        ({"token_mixing": "no"}, "`token_mixing='no'` must be True or False"),
        ({"layers": []}, r"`layers=\[\]` reads no block"),
        ({"layers": "last:2"}, "`layers='last:2'` is not understood. Use indices"),
        ({"layers": [1, 1]}, r"names \[1\] more than once"),
        ({"keep_rate": 0.0}, "a rate is a number"),
        ({"kept_tokens": "int4"}, "`kept_tokens='int4'` is unknown"),
        ({"grid": [14, 10**9]}, "must be rows and columns of patches"),
        ({"layout": {"a": 1}}, "must map each place to a module name"),
        ({"target_modules": ["q_proj"]}, "choose the blocks to read with `layers`"),
    ],
    ids=repr,
)
def test_bad_values_are_refused(values, text):
    with pytest.raises(ConfigError, match=f"LoSAConfig: .*{text}"):
        LoSAConfig(**values)


def test_what_the_model_does_not_allow_is_refused_and_nothing_is_changed(make_vit, snapshot, assert_unchanged):
    model = make_vit()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"`layers=\[3, 4\]` asks for block 4, .* 4 blocks \(0 to 3\)"):
        get_peft_model(model, LoSAConfig(layers=[3, 4]))
    assert_unchanged(model, before)


def losa(base: nn.Module, **settings) -> PeftModel:
    return get_peft_model(base, LoSAConfig(**SMALL, **settings)).eval()


@pytest.mark.parametrize("family", ["vit_mim", "yolos", "dpt", "vivit", "siglip"])
def test_any_head_gets_the_refined_tokens(family):
    """It starts as the model; the last mixer reaches the head, captured outputs too; the base comes back."""
    base = SUPPORTED[family]().eval()
    batch = run_batch(base)

    def outputs(model):
        with torch.no_grad():
            return tensors_of(model(**batch))

    expected = outputs(base)
    model = losa(base)
    assert all(map(torch.equal, outputs(model), expected))
    last = find_controllers(model)[model.base_model.layers()[-1]].bsr_params["default"]
    with torch.no_grad():
        last.channel_up.bias.add_(torch.randn(last.channel_up.bias.shape))
    assert any(not torch.equal(a, b) for a, b in zip(outputs(model), expected, strict=True))
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if ".token_router." in n):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    verify_trainability(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    bare = model.unload().requires_grad_(True)  # torch may add up in another order for a frozen Linear (YOLOS's heads)
    assert all(map(torch.equal, outputs(bare), expected))


def test_the_blocks_see_the_backbones_own_tokens(make_vit, images):
    """Captured outputs are the backbone's up to the last, which is what the head gets."""
    base = make_vit()
    with torch.no_grad():
        stock = base(images, output_hidden_states=True).hidden_states
        model = losa(base, init_weights=False)
        found = model(images, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, found[:-1], stock[:-1]))
    assert not torch.allclose(found[-1], stock[-1], atol=1e-2)


def test_in_training_a_head_that_reads_the_class_token_gets_no_more(make_vit, images):
    model = losa(make_vit(), init_weights=False)
    given = []
    handle = model.get_base_model().vit.layernorm.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    model.train()(images)
    handle.remove()
    expected = model.eval()(images).logits
    assert given[0].shape[1] == 17  # somebody looks
    assert torch.equal(model.train()(images).logits, expected)
    assert model(images, output_hidden_states=True).hidden_states[-1].shape[1] == 17


def test_another_adapter_leaves_what_trains_as_it_was(make_vit, tmp_path):
    """PEFT loads adapters frozen by default; the mixers of the first train on."""
    model = losa(make_vit())
    model.save_pretrained(tmp_path)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(tmp_path, "other")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


@pytest.mark.parametrize("settings", [{}, {"token_mixing": False}], ids=str)
def test_another_image_size(make_vit, images, settings, tmp_path):
    """The same adapter on larger images: the token mixers are interpolated over the grid."""
    model = losa(make_vit(), init_weights=False, **settings)
    model.save_pretrained(tmp_path)
    larger = make_vit()
    set_image_size(larger, (48, 64))
    loaded = PeftModel.from_pretrained(larger, tmp_path, is_trainable=True).eval()
    assert loaded.peft_config["default"].grid == [4, 4]
    inputs = nn.functional.interpolate(images, (48, 64))
    with torch.no_grad():
        expected = loaded(inputs).logits
        assert torch.equal(model(inputs, interpolate_pos_encoding=True).logits, expected)
    assert torch.allclose(expected, model(images).logits, atol=2)
    loaded.train()(inputs).logits.sum().backward()


def test_interpolation_of_a_smooth_mixer_is_the_smooth_mixer():
    """Weights that are a ramp over the grid stay that ramp; the sum over patches keeps its size."""
    spec = peft_bsr.probe_model(SUPPORTED["vit"]().eval())
    mixer = SideMixer(spec, LoSAConfig(r=2, token_r=1, grid=[4, 4]))
    ramp = torch.arange(4.0)[:, None].expand(4, 4).flatten()
    with torch.no_grad():
        mixer.token_down.weight.copy_(torch.cat([torch.tensor([7.0]), ramp])[None])
        mixer.token_up.weight.copy_(torch.cat([torch.tensor([7.0]), ramp])[:, None])
    down, _, up, _ = mixer.token_weights((8, 4), None, 0)
    middle = up[1:, 0].view(8, 4)[2:6]
    assert up[0] == down[0, 0] == 7
    assert torch.allclose(middle, (torch.arange(2.0, 6.0)[:, None] / 2 - 0.25).expand(4, 4), atol=0.1)
    assert torch.allclose(down[0, 1:], up[1:, 0] / 2)


def test_patches_of_which_no_grid_is_known_are_refused(make_vit, images):
    model = losa(make_vit())
    embed = model.get_base_model().vit.embeddings
    embed.register_forward_hook(lambda _m, _a, output: output[:, :-3])
    with pytest.raises(InputError, match="made for 4 x 4 patches, but this input has 13"):
        model(images)


class Samples(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": torch.tensor(index % 3)}


@pytest.mark.parametrize(
    "settings", [{"layers": [0, 2]}, {"keep_rate": 0.5}, {"keep_rate": 0.5, "mode": "full_view"}], ids=str
)
def test_from_a_feature_cache_no_block_runs_and_gradients_are_the_same(make_vit, images, tmp_path, settings):
    model = losa(make_vit(), init_weights=False, **settings)
    cache = FeatureCache.build(model, Samples(images), tmp_path, dtype=torch.float32, progress=False)
    batch = torch.utils.data.default_collate([cache[0], cache[1]])
    labels = batch["labels"]

    def gradients(**inputs):
        model.zero_grad()
        model.train()(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(pixel_values=images, labels=labels)
    ran = []
    for block in model.get_base_model().vit.layers:
        block.attention.register_forward_hook(lambda *_: ran.append(1))
    with cache.read_by(model):
        ran.clear()
        found = gradients(**batch)
    assert not ran
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
