"""Blocks of models in which no token can be dropped, beyond the contract."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, FeatureCache, LoSAConfig, UnsupportedModelError, probe_model
from peft_bsr.backbones import probe_inputs, tensors_of
from peft_bsr.cost import estimate, saved_activations
from peft_bsr.errors import FeatureCacheError, LeanBlockWarning

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from families import NO_REDUCTION, run_batch

ALL = {"keep_rate": 1.0}


@pytest.fixture(scope="module")
def attached() -> PeftModel:
    """Swin with its second stage trained."""
    config = BSRConfig(**ALL, trainable_blocks="stage:2", init_weights=False)
    return get_peft_model(NO_REDUCTION["swin"](), config).eval()


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**run_batch(NO_REDUCTION["swin"]())).logits


def test_blocks_count_over_all_stages_in_running_order(attached):
    spec = attached.base_model.spec
    assert [block.rpartition("encoder.")[2] for block in spec.blocks] == [
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
    ]
    assert [(block.stage, block.width) for block in spec.stage_blocks] == [(1, 16), (1, 16), (2, 32), (2, 32)]
    assert spec.stage_blocks[2].before == (
        "swin.encoder.layers.0.downsample.norm",
        "swin.encoder.layers.0.downsample.reduction",
    )
    assert attached.base_model.plan().trained_blocks == [2, 3]


def test_widths_part_the_stages_of_one_list():
    spec = probe_model(NO_REDUCTION["sam2"](), needs_tokens=False)
    assert [block.stage for block in spec.stage_blocks] == [1, 2, 2]


def test_nothing_is_kept_before_the_first_trained_block(attached):
    model = copy.deepcopy(attached).train()
    seen = {}
    stage = model.base_model.model.swin.encoder.layers[0]
    stage.register_forward_hook(lambda _m, _a, output: seen.update(needs=output[0].requires_grad))
    model(**run_batch(model.base_model.model)).logits.sum().backward()
    assert seen == {"needs": False}
    trained = {name.split(".bsr_params")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split("model.")[-1].split(".")[0] for name in trained} == {"swin", "classifier"}
    assert not any("layers.0." in name for name in trained)


@pytest.mark.parametrize(("make", "has"), [("swin", "its stages are 1 to 2"), ("vit", "it has no stages")])
def test_a_stage_that_is_not_there(make, has, make_model):
    model = make_model("vit") if make == "vit" else NO_REDUCTION["swin"]()
    with pytest.raises(ConfigError, match=f"'stage:5'` names a stage that this model does not have: {has}"):
        get_peft_model(model, BSRConfig(**ALL, trainable_blocks="stage:5"))


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"gradient_tokens": 0.5}, "`gradient_tokens=1.0`"),
        ({"saved_activations": "int8"}, '`saved_activations="full"`'),
        ({"tasks": {"a": 2}}, "`tasks=None`"),
    ],
)
def test_what_needs_tokens_is_refused(attached, settings, instead):
    (name,) = settings
    for model in (attached.base_model, NO_REDUCTION["swin"]()):  # the second adapter, and the first
        with pytest.raises(UnsupportedModelError, match=rf"It is needed for `{name}=.*Use {instead}: the blocks"):
            type(attached.base_model).resolve(getattr(model, "model", model), BSRConfig(**ALL, **settings))


@pytest.mark.parametrize("config", [ALaSTConfig(), LoSAConfig()], ids=["alast", "losa"])
def test_methods_that_read_tokens_refuse_it(config):
    with pytest.raises(UnsupportedModelError, match="is not supported: it has stages"):
        get_peft_model(NO_REDUCTION["swin"](), config)


def test_probing_leaves_the_windows_as_they_are():
    """Swin makes its windows smaller for good where an image has fewer places than a window."""
    model = NO_REDUCTION["swin"](image_size=16, window_size=4)
    blocks = [block for stage in model.swin.encoder.layers for block in stage.blocks]
    before = [(block.window_size, block.shift_size) for block in blocks]
    get_peft_model(model, BSRConfig(**ALL))
    assert [(block.window_size, block.shift_size) for block in blocks] == before


def test_adapters_are_switched_merged_and_copied(attached):
    model = copy.deepcopy(attached)
    expected = run(model)
    base = run(NO_REDUCTION["swin"]())
    assert not torch.equal(expected, base)
    model.add_adapter("other", BSRConfig(**ALL, trainable_blocks=[0], trainable="lora", init_weights=False))
    model.set_adapter("other")
    assert not torch.equal(run(model), expected)
    model.set_adapter("default")
    assert torch.equal(run(model), expected)
    torch.testing.assert_close(run(model.merge_and_unload()), expected)


def test_a_hook_in_the_mlp_turns_its_half_to_stock(attached):
    model = copy.deepcopy(attached).train()
    calls = []
    model.base_model.model.swin.encoder.layers[1].blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(LeanBlockWarning, match="block 2 runs its mlp half as stock modules"):
        model(**run_batch(model.base_model.model))
    assert calls == [1]
    assert "mlp runs stock: the hook" in model.base_model.explain()


def gradients(model, run, precision=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # whole paths are dropped at random
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = run(**run_batch(model.base_model.model)).logits
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("way", ["compiled", "after an exception", "autocast"])
def test_lean_blocks_give_the_gradients_of_stock_ones(way):
    stock, lean = (
        get_peft_model(NO_REDUCTION["swin"](), BSRConfig(**ALL, trainable_blocks="stage:2", lean=level)).train()
        for level in ("off", "max")
    )
    halves = lean.base_model.plan().blocks[2].lean
    assert halves.attention and halves.mlp, "otherwise stock blocks are compared with themselves"
    precision = torch.bfloat16 if way == "autocast" else torch.float32
    expected, run = gradients(stock, stock, precision), lean
    if way == "compiled":
        run = torch.compile(lean, backend="aot_eager")
    if way == "after an exception":
        handle = lean.base_model.model.swin.layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gradients(lean, lean)
        handle.remove()
    found = gradients(lean, run, precision)
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    assert ("runs stock: torch.compile traces a block" in lean.base_model.explain()) == (way == "compiled")
    if way == "autocast":  # bf16 has 8 bits: as far from fp32 as the stock blocks are
        exact = gradients(stock, stock)
        errors = [sum(float((g[n] - exact[n]).square().sum()) for n in exact) ** 0.5 for g in (found, expected)]
        assert errors[0] < 1.2 * errors[1]
    else:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_modules_between_stages_train_after_the_cut():
    saved = {"modules_to_save": ["downsample"]}
    with pytest.raises(ConfigError, match="which no gradient reaches: it runs before block 2"):
        get_peft_model(NO_REDUCTION["swin"](), BSRConfig(**ALL, trainable_blocks=[2], **saved))
    model = get_peft_model(NO_REDUCTION["swin"](), BSRConfig(**ALL, trainable_blocks=[1], **saved)).train()
    model(**run_batch(model.base_model.model)).logits.sum().backward()
    found = [p.grad is not None for n, p in model.named_parameters() if "downsample.modules_to_save" in n]
    assert found and all(found)


def images(number: int = 4) -> list[dict[str, torch.Tensor]]:
    pixels = torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": torch.tensor(1)} for image in pixels]


def test_a_feature_cache_at_the_cut(attached, tmp_path):
    model = copy.deepcopy(attached)
    cache = FeatureCache.build(model, images(), tmp_path, dtype=torch.float32, progress=False)
    rows = torch.utils.data.default_collate([cache[i] for i in range(4)])
    whole = torch.utils.data.default_collate(images())
    with torch.no_grad():
        expected = model(**whole).loss
        with cache.read_by(model):
            assert torch.equal(model(**rows).loss, expected)


def test_a_cache_is_refused_where_the_head_reads_earlier_stages(tmp_path):
    sizes = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
    sizes |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16)).eval()
    adapted = get_peft_model(model, BSRConfig(**ALL, trainable_blocks="last:1"))
    samples = [{"pixel_values": sample["pixel_values"]} for sample in images()]
    with pytest.raises(FeatureCacheError, match="it reads more than these tokens"):
        FeatureCache.build(adapted, samples, tmp_path, progress=False)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("lean", ["exact", "max"])
@pytest.mark.parametrize("family", ["sam", "swin", "hiera", "segformer", "convnext", "sam2"])
def test_estimates_are_what_is_measured(family, lean):
    config = BSRConfig(**ALL, trainable_blocks="last:2", lean=lean)
    found = estimate(NO_REDUCTION[family](), config, batch_size=2)
    model = get_peft_model(NO_REDUCTION[family](), config).train()
    inputs = probe_inputs(model.base_model.model, 2, model.base_model.spec.image_shape)

    def loss():
        return sum(t.float().sum() for t in tensors_of(model(**inputs)) if t.requires_grad)

    assert found.plan == model.base_model.plan()
    assert found.saved_bytes == pytest.approx(saved_activations(model, loss), rel=0.02)
    assert found.saved_bytes < estimate(NO_REDUCTION[family](), batch_size=2).saved_bytes


def test_estimates_say_what_they_cannot_follow():
    with pytest.raises(UnsupportedModelError, match="EomtForUniversalSegmentation reads numbers from tensors"):
        estimate(NO_REDUCTION["eomt"](), BSRConfig(**ALL, trainable_blocks="last:2"))


def test_new_bias_tables_keep_no_block_from_running_lean():
    model = NO_REDUCTION["swin"]()
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            parameter.data.zero_()
    adapted = get_peft_model(model, BSRConfig(**ALL, lean="max"))
    assert all(block.lean.attention for block in adapted.base_model.plan().blocks if block.lean)
    assert not adapted.base_model.plan().notes
