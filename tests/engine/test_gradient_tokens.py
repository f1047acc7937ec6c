"""The forward does not change; gradients equal those of a reference in which the other tokens are detached."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, ForwardError
from peft_bsr.cost import estimate, saved_activations
from peft_bsr.errors import LeanBlockWarning

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
sys.path.insert(0, str(Path(__file__).parent))

from gradient_tokens import loss_with_gradients_of_some
from pairs import SUPPORTED, make, stock_halves
from pairs import step as any_step

pytestmark = pytest.mark.sampled(2)

LABELS = torch.tensor([0, 2])
SOUND = ("wav2vec2", "wav2vec2_large", "hubert", "hubert_large", "data2vec_audio", "unispeech_sat")
WITHOUT_DROPOUT = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "mask_time_prob")
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
@pytest.mark.parametrize(("first", "keep_rates"), [(1, {}), (0, {}), (1, {2: 0.6}), (1, {0: 0.7, 1: 0.5})], ids=str)
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


@pytest.mark.parametrize(("lean", "trainable"), [("off", "lora"), ("exact", "full"), ("max", "lora")])
def test_the_forward_is_the_ordinary_one_to_the_last_digit(lean, trainable, make_model, images):
    """With fused tokens, which always carry gradients."""
    settings = {"trainable": trainable, "reduction_blocks": [1], "lean": lean, "keep_rate": 0.6}
    whole, parted = (attach(make_model("vit"), gradient_tokens=share, **settings) for share in (1.0, 0.5))
    (loss, gradients), (same, others) = step(whole, images), step(parted, images)
    assert torch.equal(loss, same)
    assert distance(others, gradients) > 1e-3
    assert torch.equal(whole.eval()(pixel_values=images).logits, parted.eval()(pixel_values=images).logits)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("chosen_by", "reduced"), [("random", 1), ("random", 2), ("score", 1)])
def test_checkpointing_chooses_the_same_tokens(chosen_by, reduced, make_model, images):
    """At random also where the block that chooses first draws again at its reduction."""
    settings = {"gradient_tokens": 0.5, "gradient_tokens_by": chosen_by, "lean": "max", "keep_rate": 0.6}
    settings["reduction_blocks"] = [reduced]
    found = []
    for kind in (None, False, True):
        model = attach(make_model("vit"), **settings)
        if kind is not None:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": kind})
        torch.manual_seed(3)
        found.append(step(model, images))
    (loss, gradients), *others = found
    assert all(torch.equal(loss, other) for other, _ in others)
    assert max(distance(other, gradients) for _, other in others) < 1e-4


class CheckpointedCalls(nn.ModuleList):
    """Blocks that are checkpointed around their call, as timm and torch's `checkpoint_wrapper` do."""

    def __iter__(self):
        return (partial(checkpoint, block, use_reentrant=False) for block in super().__iter__())


def test_a_recomputation_that_would_choose_other_tokens_is_refused(make_model, images):
    model = attach(make_model("vit"), gradient_tokens=0.5)
    model.get_base_model().vit.layers.__class__ = CheckpointedCalls
    with pytest.raises(ForwardError, match=r"gradient checkpointing wraps the block's call.*`gradient_tokens=1.0`"):
        step(model, images)


def test_what_is_kept_in_8_bits_is_near(make_model, images):
    found = []
    for numbers in ("full", "int8"):
        model = attach(make_model("vit"), gradient_tokens=0.5, lean="max", saved_activations=numbers)
        found.append(torch.cat([g.flatten() for g in step(model, images)[1].values()]))
    assert 1e-4 < (found[0] - found[1]).norm() / found[0].norm() < 0.05


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in ("dinov3", "yolos", "vit_mim", "beit", "vjepa2") else pytest.mark.slow)
        for name in sorted(SUPPORTED)
    ],
)
def test_every_family_runs_as_ever_or_is_refused(family):
    """Rotary tables, suffix tokens, the whole grid, position biases; a reduction in the first trained block."""
    refused = dict.fromkeys(("mlcd", "vjepa2", "data2vec", "data2vec_shared_bias"), "cannot be taken apart")
    refused |= dict.fromkeys(("wav2vec2", "hubert", "data2vec_audio"), "its blocks are not norm, attention")
    extra = dict.fromkeys(WITHOUT_DROPOUT, 0.0) if family in SOUND else {}
    if family.startswith(("beit", "data2vec")) and family not in SOUND:
        with pytest.raises(ConfigError, match="drops whole paths"):
            make(family, "exact", gradient_tokens=0.5)
        extra = {"drop_path_rate": 0.0}
    if family in refused:
        for lean in ("exact", "off"):
            with pytest.raises(ConfigError, match=refused[family]):
                make(family, lean, extra, gradient_tokens=0.5)
        return
    whole, parted = (make(family, "exact", extra, gradient_tokens=share) for share in (1.0, 0.5))
    expected, found = any_step(whole), any_step(parted)
    assert found.keys() == expected.keys() and not stock_halves(parted)
    for name, value in expected.items():
        if name.startswith("output"):  # norms that compute in fp32 round the last digit by how many rows they see
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(found[n], v) for n, v in expected.items() if not n.startswith("output"))


def test_alast_has_gradients_of_some(make_model, images):
    settings = {"gradient_tokens": 0.5, "trainable_blocks_per_step": 2}
    whole, parted = (
        get_peft_model(make_model("vit"), ALaSTConfig(**settings | {"gradient_tokens": share})).train()
        for share in (1.0, 0.5)
    )
    (loss, gradients), (same, others) = step(whole, images), step(parted, images)
    assert torch.equal(loss, same)
    assert distance(others, gradients) > 1e-3
    assert "gradients of 0.5 of the tokens (by class)" in parted.base_model.explain()


def test_what_is_kept_is_what_was_predicted(make_model, images):
    """More tokens with gradients keep more."""
    base = make_model("vit")
    with torch.device("meta"):
        bare = type(base)(base.config)
    kept = []
    for share in (0.25, 0.5, 1.0):
        config = BSRConfig(trainable_blocks=[1, 2, 3], **NONE, gradient_tokens=share)
        model = get_peft_model(make_model("vit"), config).train()
        kept.append(saved_activations(model, lambda m=model: m(pixel_values=images).logits.sum()))
    assert kept == sorted(kept) and kept[0] < 0.8 * kept[2]
    half = BSRConfig(trainable_blocks=[1, 2, 3], **NONE, gradient_tokens=0.5)
    assert estimate(bare, half, batch_size=2).saved_bytes == pytest.approx(kept[1], rel=0.02)


def test_a_block_that_someone_looks_into_has_gradients_of_all(make_model, images):
    model = attach(make_model("vit"), gradient_tokens=0.5)
    seen = []
    mlp = model.base_model.model.vit.layers[2].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with pytest.warns(LeanBlockWarning, match="block 2"):
        step(model, images)
    handle.remove()
    assert seen == [17]
    assert "all tokens carry gradients: the hook" in model.base_model.explain()
    step(model, images)
    assert not stock_halves(model)


def test_an_attention_that_rotates_by_itself_is_refused():
    """In the parts of V-JEPA 2's attention the rotation would be missing, and the loss another one."""
    with pytest.raises(ConfigError, match="its attention cannot be taken apart: it runs as the block's own modules"):
        make("vjepa2", "exact", gradient_tokens=0.5)


def test_what_cannot_be_is_said_before_anything_changes():
    for value in (0, 1.5, True, "half"):
        with pytest.raises(ConfigError, match="`gradient_tokens="):
            BSRConfig(gradient_tokens=value)
    with pytest.raises(ConfigError, match="`gradient_tokens_by='best'` is unknown"):
        BSRConfig(gradient_tokens=0.5, gradient_tokens_by="best")
    with pytest.raises(ConfigError, match="balances its load over all of them"):
        BSRConfig(gradient_tokens=0.5, tasks={"a": 2}, moe={})
