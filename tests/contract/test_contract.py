"""Supported families pass every check in every mode that their head allows; others are rejected with a reason."""

from __future__ import annotations

import pytest
import torch
from checks import CHECKS, MODELS, WITHOUT_TOKENS, assert_same, attach, lean_levels, outputs
from families import NO_REDUCTION, REFUSED, SUPPORTED, run_batch
from peft import get_peft_model
from report import FAMILIES, VERSIONS, render, survey

from peft_bsr import BSRConfig, ConfigError, UnsupportedModelError, probe_model

pytestmark = [pytest.mark.filterwarnings("ignore:.*lru_cache.*"), pytest.mark.sampled(2)]

# family -> default mode, default score, whether the other mode works
EXPECTED = {
    "vit": ("compact", "class", True),
    "vit_bare": ("full_view", "class", True),
    "vit_mim": ("full_view", "class", False),
    "deit": ("compact", "class", True),
    "deit_teacher": ("compact", "class", True),
    "deit_mim": ("full_view", "class", False),
    "vit_msn": ("compact", "class", True),
    "vit_mae": ("full_view", "class", True),
    "ijepa": ("compact", "mean_query", True),
    "ast": ("compact", "class", True),
    "whisper": ("compact", "mean_query", True),
    "whisper_bare": ("full_view", "mean_query", True),
    "whisper_text": ("full_view", "mean_query", True),
    "wav2vec2": ("full_view", "mean_query", False),
    "wav2vec2_large": ("full_view", "mean_query", False),
    "hubert": ("full_view", "mean_query", False),
    "hubert_large": ("full_view", "mean_query", False),
    "data2vec_audio": ("full_view", "mean_query", False),
    "unispeech_sat": ("full_view", "mean_query", False),
    "vivit": ("compact", "class", True),
    "videomae": ("compact", "mean_query", True),
    "dinov2": ("compact", "class", True),
    "dinov2_swiglu": ("compact", "class", True),
    "dinov2_backbone": ("full_view", "class", False),
    "dinov2_registers": ("compact", "class", True),
    "dinov3": ("full_view", "class", True),
    "dinov3_backbone": ("full_view", "class", False),
    "dinov3_gated": ("full_view", "class", True),
    "dinov3_headed": ("compact", "class", True),
    "beit": ("compact", "class", True),
    "beit_shared_bias": ("compact", "class", True),
    "beit_no_bias": ("compact", "class", True),
    "data2vec": ("compact", "class", True),
    "data2vec_shared_bias": ("compact", "class", True),
    "clip": ("compact", "class", True),
    "clip_bare": ("full_view", "class", True),
    "clip_projection": ("full_view", "class", True),
    "metaclip2": ("compact", "class", True),
    "owlvit": ("full_view", "class", True),
    "owlv2": ("full_view", "class", True),
    "chinese_clip": ("full_view", "class", True),
    "siglip": ("compact", "mean_query", True),
    "siglip_pooling": ("full_view", "mean_query", True),
    "siglip2": ("full_view", "mean_query", False),
    "siglip2_pooling": ("full_view", "mean_query", False),
    "aimv2": ("full_view", "mean_query", True),
    "aimv2_headed": ("compact", "mean_query", True),
    "pixio": ("full_view", "class", True),
    "internvl": ("full_view", "class", True),
    "internvl_qk_norm": ("full_view", "class", True),
    "radio": ("full_view", "class", True),
    "radio_headed": ("compact", "class", True),
    "blip": ("full_view", "class", True),
    "vjepa2": ("compact", "mean_query", True),
    "mlcd": ("full_view", "class", True),
    "dpt": ("full_view", "class", False),
    "detr_dinov2": ("full_view", "class", False),
    "yolos": ("full_view", "mean_query", False),
    "depth_anything": ("full_view", "class", False),
    "upernet": ("full_view", "class", False),
    "vitpose": ("full_view", "mean_query", False),
    "conditional_detr": ("full_view", "class", False),
    "clip_dual": ("compact", "class", True),
    "siglip_dual": ("compact", "mean_query", True),
    "llava": ("full_view", "class", False),
    "paligemma": ("full_view", "mean_query", False),
    "smolvlm": ("full_view", "mean_query", False),
    "internvl_chat": ("full_view", "class", False),
}
OTHER = {"compact": "full_view", "full_view": "compact"}
CASES = [
    (family, mode)
    for family, (chosen, _, other_works) in EXPECTED.items()
    for mode in (chosen, *([OTHER[chosen]] if other_works else []))
]
REASONS = {
    "resnet": "it has no list of equal blocks",
    "hubert_layerdrop": "skips whole blocks at random",
}
MLP_ALONE = "exact (mlp only), max"
# no token can be dropped -> the reason, and what of block 1 runs lean: a window copies what its norm gives
WITHOUT = {
    "wavlm": ("its blocks use the position of a token inside", MLP_ALONE),
    "wavlm_large": ("its blocks use the position of a token inside", MLP_ALONE),
    "swin": ("it has stages", MLP_ALONE),
    "swinv2": ("it has stages", MLP_ALONE),
    "hiera": ("it has stages", MLP_ALONE),
    "sam": (r"its first block gets \(2, 4, 4, 32\)", "exact, max"),
    "vitdet": (r"its first block gets \(2, 32, 4, 4\)", "exact, max"),
    "segformer": (
        "it has stages",
        "exact (attention only), max (attention only)",
    ),  # a convolution lies inside of its MLP
    "eomt": (r"block 2 maps \(1, 25, 32\)", "exact, max"),
    "pvt": ("it has stages", "exact, max"),
    "convnext": ("it has no list of equal blocks", "exact (mlp only), max (mlp only)"),
    "sam2": ("its first block gets", MLP_ALONE),
    "sam2_vision": ("its first block gets", MLP_ALONE),
    "sam3": ("its first block gets", "exact, max"),
    "timesformer": ("its blocks have several attentions", "exact, max"),
    "maskformer": ("it has stages", MLP_ALONE),
    "mask2former": ("it has stages", MLP_ALONE),
    "detr_swin": ("it has stages", MLP_ALONE),
    "conditional_detr_swin": ("it has stages", MLP_ALONE),
    "rt_detr_swin": ("it has stages", MLP_ALONE),
    "qwen2_5_vl": (r"its first block gets \(128, 32\)", MLP_ALONE),  # packed patches of all images
}


POST_NORM = dict.fromkeys(("wav2vec2", "hubert", "data2vec_audio"), "exact (mlp only), max (mlp only)")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", SUPPORTED)
def test_blocks_run_lean(family):
    assert lean_levels(family) == POST_NORM.get(family, "exact, max")


def test_every_family_has_an_expectation():
    assert list(EXPECTED) == list(SUPPORTED)
    assert list(REASONS) and set(REASONS) == set(REFUSED)
    assert list(WITHOUT) == list(NO_REDUCTION)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("family", "mode"), CASES, ids=lambda value: str(value))
def test_contract(family, mode, check):
    chosen = EXPECTED[family][0]
    CHECKS[check](family, None if mode == chosen else mode)


OFTEN = ("swin", "swinv2", "hiera", "sam", "vitdet", "segformer", "timesformer")  # the others: slow tests


@pytest.mark.parametrize("check", WITHOUT_TOKENS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in NO_REDUCTION]
)
def test_contract_without_token_reduction(family, check):
    CHECKS[check](family, None)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", NO_REDUCTION)
def test_where_no_token_can_be_dropped_the_default_is_refused_with_the_reason(family):
    reason, lean = WITHOUT[family]
    with pytest.raises(UnsupportedModelError, match=rf"has no token reduction: {reason}.*Use `keep_rate=1.0`"):
        get_peft_model(NO_REDUCTION[family](), BSRConfig())
    with pytest.raises(UnsupportedModelError, match=rf"is not supported: {reason}"):
        probe_model(NO_REDUCTION[family]())
    assert lean_levels(family) == lean


PROJECTIONS = {"attention.query", "attention.value"}
WITHOUT_PROJECTIONS = ("convnext", "wavlm", "wavlm_large")  # no attention, or one whose weights belong to it as a whole


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", [n for n in (*SUPPORTED, *NO_REDUCTION) if n not in WITHOUT_PROJECTIONS])
def test_the_preset_of_lora_trains_queries_and_values_in_every_block(family):
    model = get_peft_model(MODELS[family](), BSRConfig(preset="lora"))
    spec, layout = model.base_model.spec, model.peft_config["default"].layout
    places = [place.split(".", 2)[1:] for place in layout if place.startswith("blocks.")]
    by_block = {int(index): {role for other, role in places if other == index} for index, _ in places}
    assert list(by_block) == list(range(spec.last_read + 1))
    if family == "timesformer":  # has two attentions in each block
        by_block = {index: roles - {"temporal_attention.attention.qkv"} for index, roles in by_block.items()}
    assert all(roles in (PROJECTIONS, {"attention.qkv"}) for roles in by_block.values()), by_block
    batch = run_batch(model.get_base_model())
    assert_same(outputs(model.eval(), batch), outputs(MODELS[family]().eval(), batch))


@pytest.mark.parametrize("family", WITHOUT_PROJECTIONS)
def test_the_preset_of_lora_without_projections(family):
    with pytest.raises(ConfigError, match=r"`target_modules=\['attention.query', .*leaves nothing to train in block 0"):
        get_peft_model(NO_REDUCTION[family](), BSRConfig(preset="lora"))


@pytest.mark.parametrize("family", SUPPORTED)
def test_mode_and_score_are_chosen_and_written_into_the_config(family):
    asked = BSRConfig(trainable_blocks=[1, 3])
    config = get_peft_model(SUPPORTED[family](), asked).peft_config["default"]
    mode, score, _ = EXPECTED[family]
    assert (config.mode, config.score) == (mode, score)
    assert config.fuse_dropped is (mode == "compact")
    assert asked.mode is None, "the user's config is not changed and can be used for another model"


@pytest.mark.parametrize("family", [name for name, (_, _, other) in EXPECTED.items() if not other])
def test_compact_mode_is_refused_where_the_head_needs_every_token(family):
    with pytest.raises(UnsupportedModelError, match=r"in mode 'compact', .*Use `mode='full_view'`"):
        attach(family, "compact")


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_with_the_reason_that_the_probe_found(family):
    model = REFUSED[family]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModelError, match=REASONS[family]):
        get_peft_model(model, BSRConfig())
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", SUPPORTED)
def test_probing_and_attaching_leave_the_random_state_and_the_model_alone(family):
    model = SUPPORTED[family]()
    model(**run_batch(model))  # transformers adds its own hooks at the first call
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(11)
    expected = torch.get_rng_state()
    probe_model(model)
    assert torch.equal(torch.get_rng_state(), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    get_peft_model(model, BSRConfig())
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("part", range(3))
def test_the_compatibility_page_is_up_to_date(part, pytestconfig):
    page = pytestconfig.rootpath / "docs" / "compatibility.md"
    committed = _rows(page.read_text().partition(VERSIONS)[0])
    assert committed.keys() >= FAMILIES.keys(), "run `make compatibility`"
    for family, cells in _rows(render(survey([*FAMILIES][part::3], run_checks=False))).items():
        assert committed[family] == cells, "run `make compatibility`"


def _rows(page: str) -> dict[str, list[str]]:
    """Family -> cells before those of the checks: special tokens, positions, scores, modes; or the reason."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    return {cells[1].strip(): cells[: 8 if len(cells) > 8 else 4] for cells in rows}
