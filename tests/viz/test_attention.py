from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from peft_bsr import BSRConfig, SynQTConfig, probe_model
from peft_bsr.engine import record_scores
from peft_bsr.viz import draw_attention, draw_kept_tokens, kept_token_pictures
from peft_bsr.viz.attention import _on_grid, _scores


@torch.no_grad()
def test_scores_are_the_softmax_of_eager_attention(make_model, images):
    model = make_model("vit", attn_implementation="eager")
    with record_scores(model, probe_model(model)) as found:
        output = model(pixel_values=images, output_attentions=True)
    assert [block.block for block in found] == [0, 1, 2, 3]
    for block, attention in zip(found, output.attentions, strict=True):
        torch.testing.assert_close(block.scores, attention[:, :, 0].mean(dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["vit", "dinov2_registers", "clip_bare"])
@torch.no_grad()
def test_watching_does_not_change_a_model_that_drops_tokens(family, make_model, images):
    model = get_peft_model(make_model(family), BSRConfig(reduction_blocks=[1, 2], keep_rate=0.5)).eval()
    base, spec = model.get_base_model(), model.base_model.spec
    before = model(pixel_values=images)[0]
    with record_scores(base, spec) as found:
        watched = model(pixel_values=images)[0]
    assert torch.equal(watched, before)
    assert torch.equal(model(pixel_values=images)[0], before), "nothing is left behind"
    counts = model.base_model.plan().token_counts(spec.num_tokens, spec.num_special)
    assert [block.scores.shape[1] for block in found] == [attention for attention, _ in counts]
    assert counts[3][0] < counts[2][0] < counts[1][0]
    assert all(torch.allclose(block.scores.sum(dim=1), torch.ones(2)) for block in found)


def test_dropped_patches_have_no_value_and_others_lie_where_they_come_from(make_model, images):
    model = get_peft_model(make_model(), BSRConfig(reduction_blocks=[1], keep_rate=0.5)).train()
    _, found = _scores(model, images[:1])
    assert model.training
    first, last = _on_grid(found[0], (4, 4)), _on_grid(found[3], (4, 4))
    assert first.shape == (4, 4) and not np.isnan(first).any()
    np.testing.assert_allclose(first.flatten(), found[0].scores[0, 1:], atol=1e-7)
    assert np.isnan(last).sum() == 8
    alive = found[3].route.origins[0, :-1].numpy()
    assert (alive == np.flatnonzero(~np.isnan(last.flatten()))).all()


@pytest.mark.parametrize("adapter", [None, BSRConfig(), SynQTConfig(keep_rate=0.5)])
def test_the_picture(adapter, make_model, images, tmp_path):
    model = make_model() if adapter is None else get_peft_model(make_model(), adapter)
    path = draw_attention(model, images[:1], np.random.default_rng(0).random((32, 32, 3)), tmp_path / "attention.png")
    with Image.open(path) as picture:
        assert picture.width > 2 * picture.height, "input and blocks in one line"


def test_images_of_any_shape_are_drawn_on_their_own_grid(make_model, tmp_path):
    """63 x 8 pixels are 7 x 1 patches of 8 x 8, whatever the picture's own shape says; one channel is grey."""
    model = get_peft_model(make_model("dinov2"), BSRConfig(reduction_blocks=[1, 2]))
    patch = model.base_model.spec.patch_size[0]
    pixels = torch.randn(1, 3, 8 * patch - 1, 2 * patch - 1)
    picture = np.random.default_rng(0).random((1, *pixels.shape[2:], 1))
    assert draw_attention(model, pixels, picture[0], tmp_path / "attention.png").exists()
    assert draw_kept_tokens(model, pixels, picture, tmp_path / "kept.png").exists()
    first, _ = kept_token_pictures(model, pixels, picture)
    assert first.pictures.shape == (1, *pixels.shape[2:], 3)


def test_one_image_at_a_time(make_model, images, tmp_path):
    with pytest.raises(ValueError, match="holds 2 images; one can be drawn"):
        draw_attention(make_model(), images, np.zeros((32, 32)), tmp_path / "attention.png")
