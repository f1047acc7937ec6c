from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from peft_bsr import AdapterError, BSRConfig
from peft_bsr.viz import draw_kept_tokens, kept_token_pictures
from peft_bsr.viz.kept_tokens import _blend, _veil


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 32, 32, 3)])
def test_the_picture_is_written_and_the_mode_restored(shape, make_model, images, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(reduction_blocks=[1, 2])).train()
    path = draw_kept_tokens(model, images, np.random.default_rng(0).random(shape), tmp_path / "kept.png", ["a", "b"])
    assert path == tmp_path / "kept.png"
    with Image.open(path) as picture:
        width, height = picture.size
    assert width > height, "three columns, two rows"
    assert model.training


def test_dropped_patches_are_veiled_and_kept_ones_are_not():
    image = np.zeros((4, 4, 3))
    veiled = _veil(image, np.array([[True, False], [False, True]]))
    assert (veiled[:2, :2] == 0).all()
    assert (veiled[2:, 2:] == 0).all()
    assert (veiled[:2, 2:] > 0).all()
    assert (veiled[2:, :2] > 0).all()


def test_a_model_that_keeps_everything_has_nothing_to_draw(make_model, images, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(keep_rate=1.0))
    with pytest.raises(AdapterError, match="dropped no tokens"):
        draw_kept_tokens(model, images, torch.rand(2, 32, 32).numpy(), tmp_path / "kept.png")


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_dropped_mass_is_the_attention_of_what_was_dropped(fused, make_model, images):
    base = make_model("vit", attn_implementation="eager")
    attention = base(pixel_values=images, output_attentions=True).attentions[1][:, :, 0, 1:].mean(dim=1)
    model = get_peft_model(base, BSRConfig(reduction_blocks=[1, 2], keep_rate=0.5, fuse_dropped=fused))
    first, second = kept_token_pictures(model, images, np.zeros((2, 32, 32)))
    lowest = attention.sort(dim=1).values[:, :8].sum(dim=1)
    np.testing.assert_allclose(first.dropped_mass, lowest, atol=1e-6)
    assert first.is_fused == second.is_fused == fused
    assert (second.dropped_mass > 0).all() and (second.dropped_mass < 0.5).all()


def test_merged_patches_have_the_mean_colour_of_their_token():
    image = np.arange(48.0).reshape(4, 4, 3) / 48
    blended = _blend(image, np.array([[3, 1], [2, 3]]))
    np.testing.assert_allclose(blended[0, 0], (image[:2, :2].sum((0, 1)) + image[2:, 2:].sum((0, 1))) / 8)
    np.testing.assert_allclose(blended[3, 3], blended[0, 0])
    np.testing.assert_allclose(blended[0, 2], image[:2, 2:].mean((0, 1)))


def test_a_model_that_merges_is_drawn(make_model, images, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(reduction_blocks=[1, 2], reduction="merge"))
    first, second = kept_token_pictures(model, images, np.random.default_rng(0).random((2, 32, 32)))
    assert first.dropped_mass is None and not first.is_fused
    colours = [len(np.unique(kept.pictures[0].reshape(-1, 3), axis=0)) for kept in (first, second)]
    assert colours == [8, 4], "one for each token"
    assert draw_kept_tokens(model, images, np.zeros((2, 32, 32)), tmp_path / "merged.svg").exists()
