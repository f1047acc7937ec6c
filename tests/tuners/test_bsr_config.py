"""BSRConfig: what it accepts, what it means, and what it refuses before anything is changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from peft_bsr import BSRConfig, ConfigError, UnsupportedModelError

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    (
        {"trainable_blocks": [-1, 2]},
        "BSRConfig: `trainable_blocks=[-1, 2]` has negative indices [-1]. Count blocks from 0.",
    ),
    (
        {"trainable_blocks": [1, 3, 1]},
        "BSRConfig: `trainable_blocks=[1, 3, 1]` names [1] more than once. Name each block once.",
    ),
    (
        {"trainable_blocks": []},
        "BSRConfig: `trainable_blocks=[]` must be a non-empty list of block indices, "
        '"every:n", "last:n", "last:n%" or "stage:n".',
    ),
    (
        {"trainable_blocks": 3},
        "BSRConfig: `trainable_blocks=3` must be a non-empty list of block indices, "
        '"every:n", "last:n", "last:n%" or "stage:n".',
    ),
    (
        {"trainable_blocks": "evry:4"},
        "BSRConfig: `trainable_blocks='evry:4'` is not understood. "
        'Use indices such as `[3, 7, 11]`, "every:4", "last:3", "last:75%" or "stage:4".',
    ),
    (
        {"reduction_blocks": [-3]},
        "BSRConfig: `reduction_blocks=[-3]` has negative indices [-3]. Count blocks from 0.",
    ),
    (
        {"reduction_blocks": [2, 2]},
        "BSRConfig: `reduction_blocks=[2, 2]` names [2] more than once. Name each block once.",
    ),
    ({"reduction_blocks": "all"}, "BSRConfig: `reduction_blocks='all'` must be a list of block indices or None."),
    ({"keep_rate": 0}, "BSRConfig: `keep_rate=0` holds 0; a rate is a number in (0, 1], 1.0 = keep all."),
    ({"keep_rate": 1.5}, "BSRConfig: `keep_rate=1.5` holds 1.5; a rate is a number in (0, 1], 1.0 = keep all."),
    (
        {"keep_rate": "half"},
        "BSRConfig: `keep_rate='half'` holds 'half'; a rate is a number in (0, 1], 1.0 = keep all.",
    ),
    (
        {"keep_rate": [0.5, 2.0]},
        "BSRConfig: `keep_rate=[0.5, 2.0]` holds 2.0; a rate is a number in (0, 1], 1.0 = keep all.",
    ),
    (
        {"keep_rate": [0.5, 0.7], "reduction_blocks": [1, 2, 3]},
        "BSRConfig: `keep_rate=[0.5, 0.7]` has 2 rates for the 3 blocks of `reduction_blocks=[1, 2, 3]`. "
        "Give one rate, or one for each block.",
    ),
    ({"reduce_at": "before"}, "BSRConfig: `reduce_at='before'` is unknown. Use one of 'mid_block', 'after_block'."),
    ({"trainable": "bitfit"}, "BSRConfig: `trainable='bitfit'` is unknown. Use one of 'full', 'lora'."),
    ({"fuse_dropped": 2}, "BSRConfig: `fuse_dropped=2` must be True, False or None."),
    ({"mode": "short"}, "BSRConfig: `mode='short'` is unknown. Use one of 'compact', 'full_view'."),
    ({"score": "norm"}, "BSRConfig: `score='norm'` is unknown. Use one of 'class', 'mean_query', 'received'."),
    (
        {"fuse_dropped": True, "mode": "full_view"},
        "BSRConfig: `fuse_dropped=True` needs a place for the fused token, but in `mode='full_view'` the sequence "
        "keeps its length and the dropped tokens their place. Leave one of them None.",
    ),
    ({"init_weights": "no"}, "BSRConfig: `init_weights='no'` must be True or False."),
    ({"r": 0}, "BSRConfig: `r=0` must be an integer from 1 to 65536."),
    ({"r": 2.5}, "BSRConfig: `r=2.5` must be an integer from 1 to 65536."),
    ({"lora_alpha": 0}, "BSRConfig: `lora_alpha=0` must be a number above 0, 1e+06 at most."),
    (
        {"target_modules": "all-linear"},
        "BSRConfig: `target_modules='all-linear'` is not needed: `trainable='lora'` adapts every Linear of the trained "
        "blocks. Leave it None, or name modules.",
    ),
    (
        {"target_modules": "q_proj("},
        "BSRConfig: `target_modules='q_proj('` is not a regular expression: missing ), unterminated subpattern at "
        "position 6.",
    ),
    (
        {"exclude_modules": "[a"},
        "BSRConfig: `exclude_modules='[a'` is not a regular expression: unterminated character set at position 0.",
    ),
    (
        {"target_modules": ["q_proj", 1]},
        "BSRConfig: `target_modules=['q_proj', 1]` must be a list of names, a regular expression or None.",
    ),
    ({"exclude_modules": 5}, "BSRConfig: `exclude_modules=5` must be a list of names, a regular expression or None."),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=[repr(values) for values, _ in BAD_VALUES])
def test_a_bad_value_is_refused_with_its_own_text(values, message):
    with pytest.raises(ConfigError) as error:
        BSRConfig(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "values",
    [
        {"trainable_blocks": [True]},
        {"trainable_blocks": [1.0]},
        {"trainable_blocks": "every:0"},
        {"trainable_blocks": "last:"},
        {"trainable_blocks": "last:-1"},
        {"trainable_blocks": "last:0%"},
        {"trainable_blocks": "last:101%"},
        {"trainable_blocks": "every:50%"},
        {"trainable_blocks": " last:2"},
        {"reduction_blocks": 3},
        {"reduction_blocks": [False]},
        {"keep_rate": -0.5},
        {"keep_rate": float("nan")},
        {"keep_rate": True},
        {"keep_rate": ["0.5"]},
        {"trainable": ["full"]},
        {"r": True},
        {"r": "8"},
        {"lora_alpha": "16"},
        {"target_modules": [""]},
        {"target_modules": {"q_proj": 1}},
    ],
    ids=repr,
)
def test_other_bad_values_are_refused(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"`{name}="):
        BSRConfig(**values)


def test_one_error_names_every_problem():
    with pytest.raises(ConfigError) as error:
        BSRConfig(
            trainable_blocks=[-1, 1, 1],
            reduction_blocks=[0, 0],
            keep_rate=[0.5, 0.5, 7],
            reduce_at="before",
            trainable="all",
            fuse_dropped=1,
            init_weights=None,
            r=-1,
            lora_alpha=-2,
            target_modules="(",
            exclude_modules=[3],
        )
    subject, *problems = str(error.value).split("\n  - ")
    assert subject == "BSRConfig: "
    assert [problem.split("=")[0].strip("`") for problem in problems] == [
        "trainable_blocks",
        "trainable_blocks",
        "reduction_blocks",
        "keep_rate",
        "keep_rate",
        "reduce_at",
        "fuse_dropped",
        "trainable",
        "init_weights",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
    ]
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("rule", "depth", "blocks"),
    [
        ("every:4", 12, [3, 7, 11]),
        ("every:4", 24, [3, 7, 11, 15, 19, 23]),
        ("every:4", 4, [3]),
        ("every:3", 4, [0, 3]),
        ("every:9", 4, [3]),
        ("last:2", 4, [2, 3]),
        ("last:4", 4, [0, 1, 2, 3]),
        ("last:75%", 4, [1, 2, 3]),
        ("last:1%", 4, [3]),
        ("last:100%", 4, [0, 1, 2, 3]),
        ([2, 0], 4, [0, 2]),
    ],
)
def test_trainable_blocks_rules(make_vit, rule, depth, blocks):
    model = get_peft_model(make_vit(depth), BSRConfig(trainable_blocks=rule))
    assert model.base_model.plan().trained_blocks == blocks


@pytest.mark.parametrize(
    ("depth", "trained", "reducing"), [(12, [3, 7, 11], [3, 6, 9]), (24, [3, 7, 11, 15, 19, 23], [6, 12, 18])]
)
def test_defaults_are_the_papers_scaled_to_the_depth(make_vit, depth, trained, reducing):
    plan = get_peft_model(make_vit(depth), BSRConfig()).base_model.plan()
    assert plan.trained_blocks == trained
    assert {i: b.reduction.keep_rate for i, b in enumerate(plan.blocks) if b.reduction} == dict.fromkeys(reducing, 0.5)
    assert all(b.reduction.fuse and b.reduction.position == "mid_block" for b in plan.blocks if b.reduction)
    assert [b.cut_gradient for b in plan.blocks] == [i <= 3 for i in range(depth)]


def test_each_reducing_block_gets_its_own_rate(make_vit):
    config = BSRConfig(reduction_blocks=[3, 1], keep_rate=[0.25, 0.75], fuse_dropped=False, reduce_at="after_block")
    plan = get_peft_model(make_vit(), config).base_model.plan()
    rates = {i: b.reduction.keep_rate for i, b in enumerate(plan.blocks) if b.reduction}
    assert rates == {1: 0.75, 3: 0.25}
    assert plan.token_counts(17, 1) == [(17, 17), (17, 17), (13, 13), (13, 13)]


@pytest.mark.parametrize("settings", [{"keep_rate": 1.0}, {"reduction_blocks": []}], ids=repr)
def test_reduction_can_be_switched_off(make_vit, settings):
    assert not get_peft_model(make_vit(), BSRConfig(**settings)).base_model.plan().reduces


def test_tuples_sets_and_ranges_are_accepted_and_become_lists():
    config = BSRConfig(
        trainable_blocks=range(2),
        reduction_blocks=(1, 2),
        keep_rate=(0.5, 0.7),
        target_modules={"v_proj", "q_proj"},
        exclude_modules={"fc2", "fc1"},
    )
    assert (config.trainable_blocks, config.reduction_blocks, config.keep_rate) == ([0, 1], [1, 2], [0.5, 0.7])
    assert (config.target_modules, config.exclude_modules) == (["q_proj", "v_proj"], ["fc1", "fc2"])
    json.dumps(config.to_dict())


def test_a_tuple_of_module_names_is_accepted_like_a_set():
    config = BSRConfig(target_modules=("q_proj", "v_proj"), exclude_modules=("fc1",))
    assert (config.target_modules, config.exclude_modules) == (["q_proj", "v_proj"], ["fc1"])


def test_to_dict_survives_json(tmp_path):
    config = BSRConfig(
        trainable_blocks=(1, 3),
        reduction_blocks=[1, 2],
        keep_rate=[0.5, 0.7],
        fuse_dropped=False,
        reduce_at="after_block",
        trainable="lora",
        r=2,
        lora_alpha=3.5,
        init_weights=False,
        target_modules={"q_proj"},
        exclude_modules=["fc1"],  # a pattern would not be read from a file that no model was attached for
        modules_to_save=["classifier"],
    )
    assert BSRConfig(**json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    for loader in (PeftConfig, BSRConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is BSRConfig
        assert loaded == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BSR"


def test_kwargs_of_from_pretrained_override_the_saved_ones(tmp_path):
    BSRConfig(keep_rate=0.7).save_pretrained(tmp_path)
    loaded = BSRConfig.from_pretrained(tmp_path, revision=None, inference_mode=False)
    assert (loaded.keep_rate, loaded.inference_mode) == (0.7, False)


def test_unknown_keys_of_a_newer_version_warn_and_load(tmp_path, make_vit, images, run):
    model = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[3], init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": [1, 2], "and_another": None}))
    with pytest.warns(UserWarning, match="from_the_future"):
        loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert torch.equal(run(loaded, images), run(model, images))


def test_injecting_leaves_the_users_config_alone(make_vit):
    config = BSRConfig(trainable_blocks="last:2")
    before = config.to_dict()
    attached = get_peft_model(make_vit(), config).peft_config["default"].to_dict()
    chosen = {"mode": "compact", "score": "class", "reduce_at": "mid_block", "fuse_dropped": True}
    written = {"base_model_name_or_path", "layout", "labels", "fingerprint", *chosen}
    assert {k: v for k, v in attached.items() if k not in written} == {
        k: v for k, v in before.items() if k not in written
    }
    assert {name: attached[name] for name in chosen} == chosen
    assert {name: config.to_dict()[name] for name in [*chosen, "layout", "labels"]} == dict.fromkeys(
        [*chosen, "layout", "labels"]
    )


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"trainable_blocks": [3, 12]},
        [
            "`trainable_blocks=[3, 12]` asks for block 12, but this model has 4 blocks (0 to 3). "
            'Use indices up to 3 or "last:2".'
        ],
    ),
    (
        {"trainable_blocks": "last:6"},
        ["`trainable_blocks='last:6'` asks for block -2, -1, but this model has 4 blocks (0 to 3)."],
    ),
    (
        {"reduction_blocks": [4, 9]},
        ["`reduction_blocks=[4, 9]` asks for block 4, 9, but this model has 4 blocks (0 to 3). Use indices up to 3."],
    ),
    (
        {"trainable_blocks": [7], "reduction_blocks": [8], "keep_rate": [0.5]},
        ["`trainable_blocks=[7]` asks for block 7", "`reduction_blocks=[8]` asks for block 8"],
    ),
    (
        {"keep_rate": [0.5, 0.5]},
        [
            "`keep_rate=[0.5, 0.5]` has 2 rates, but this model reduces at the 3 blocks [1, 2, 3]. "
            "Give one rate, or one for each block."
        ],
    ),
    (
        {"trainable_blocks": [2, 3], "target_modules": ["wrong"]},
        [
            "`target_modules=['wrong']` with `exclude_modules=None` leaves nothing to train in block 2, whose leaf "
            "modules are ['attention.q_proj', ",
            "leaves nothing to train in block 3",
        ],
    ),
    (
        {"trainable_blocks": [3], "trainable": "lora", "target_modules": ["layernorm_after"]},
        ["`target_modules=['layernorm_after']` with `exclude_modules=None` leaves nothing to train in block 3"],
    ),
    (
        {"trainable_blocks": [3], "exclude_modules": ".*"},
        ["`target_modules=None` with `exclude_modules='.*'` leaves nothing to train in block 3"],
    ),
    (
        {"trainable_blocks": [2], "modules_to_save": ["patch_embeddings"]},
        [
            "`modules_to_save='patch_embeddings'` means 'vit.embeddings.patch_embeddings', which no gradient reaches: "
            "it runs before block 2"
        ],
    ),
    (
        {"trainable_blocks": [2], "target_modules": ["wrong"], "modules_to_save": ["layers.0"]},
        ["`modules_to_save='layers.0'` means 'vit.layers.0', which no gradient reaches"],
    ),
]


@pytest.mark.parametrize(("settings", "texts"), REFUSED, ids=[repr(settings) for settings, _ in REFUSED])
def test_what_the_model_does_not_allow_is_refused_and_changes_nothing(
    make_vit, images, run, snapshot, assert_unchanged, settings, texts
):
    model = make_vit().train()
    model.classifier.requires_grad_(False)
    before, random_state, output = snapshot(model), torch.get_rng_state(), run(model, images)
    with pytest.raises(ConfigError) as error:
        get_peft_model(model, BSRConfig(**settings))
    for text in texts:
        assert text in str(error.value)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(run(model, images), output)
    assert get_peft_model(model, BSRConfig()).base_model.plan().trained_blocks == [3]  # and it can still be used


@pytest.mark.parametrize(("settings", "texts"), REFUSED, ids=[repr(settings) for settings, _ in REFUSED])
def test_a_refused_second_adapter_leaves_the_first_as_it_was(
    make_vit, images, run, snapshot, assert_unchanged, settings, texts
):
    model = get_peft_model(make_vit(), BSRConfig(trainable_blocks=[1], init_weights=False)).eval()
    before, output = snapshot(model), run(model, images)
    with pytest.raises(ConfigError) as error:
        model.add_adapter("second", BSRConfig(**settings))
    for text in texts:
        assert text in str(error.value)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(run(model, images), output)


@pytest.mark.parametrize("modules_to_save", ["classifier", ["classifier("], [3]], ids=repr)
def test_modules_to_save_that_cannot_be_is_a_config_error(make_vit, snapshot, assert_unchanged, modules_to_save):
    model = make_vit()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="modules_to_save"):
        get_peft_model(model, BSRConfig(modules_to_save=modules_to_save))
    assert_unchanged(model, before)


@pytest.fixture
def siglip() -> SiglipVisionModel:
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=4, **TINY)).eval()


def test_the_class_score_is_refused_without_a_class_token(siglip, images, snapshot, assert_unchanged):
    before, output = snapshot(siglip), siglip(pixel_values=images).pooler_output
    with pytest.raises((ConfigError, UnsupportedModelError)) as error:
        get_peft_model(siglip, BSRConfig(score="class"))
    assert str(error.value) == (
        "BSRConfig: `score='class'` ranks tokens by the class token's attention, but this model has no class token. "
        "Use `score='mean_query'`, or leave it None."
    )
    assert_unchanged(siglip, before)
    assert torch.equal(siglip(pixel_values=images).pooler_output, output)


def test_a_model_without_class_token_trains_on_all_tokens(siglip, images):
    expected = siglip(pixel_values=images).pooler_output
    model = get_peft_model(siglip, BSRConfig(keep_rate=1.0)).eval()
    assert model.base_model.spec.num_prefix == 0
    torch.testing.assert_close(model(pixel_values=images).pooler_output, expected)


def test_a_model_without_a_head_works(images):
    torch.manual_seed(0)
    model = get_peft_model(ViTModel(ViTConfig(num_hidden_layers=4, **TINY)), BSRConfig(trainable_blocks=[3]))
    assert model.eval()(pixel_values=images).pooler_output.shape == (2, 32)


def test_gradient_tokens_are_not_chosen_among_merged_ones():
    with pytest.raises(ConfigError, match="chooses tokens by their scores, which merging does not"):
        BSRConfig(reduction="merge", gradient_tokens=0.5)


BALANCED = {
    "trainable_blocks": "last:75%",
    "trainable": "lora",
    "keep_rate": 0.5,
    "reduction": "merge",
    "lean": "max",
}


@pytest.mark.parametrize(
    "given",
    [{}, {"keep_rate": 0.9, "lean": "off"}, {"trainable_blocks": "every:4", "reduction": "drop", "lean": "exact"}],
)
def test_the_balanced_preset(make_vit, images, run, given, tmp_path):
    """Arguments win over it, also those that are the defaults without it; it loads as it was saved."""
    config = BSRConfig(preset="balanced", init_weights=False, **given)
    assert {name: getattr(config, name) for name in BALANCED} == BALANCED | given
    model = get_peft_model(make_vit(), config).eval()
    assert model.base_model.plan().trained_blocks == ([3] if "trainable_blocks" in given else [1, 2, 3])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert torch.equal(run(loaded, images), run(model, images))
    found = loaded.peft_config["default"]
    assert {name: getattr(found, name) for name in BALANCED} == BALANCED | given
    assert found.preset == "balanced"


def test_an_argument_that_is_none_is_not_given():
    assert BSRConfig(**dict.fromkeys(BALANCED)) == BSRConfig()
