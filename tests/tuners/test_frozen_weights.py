"""Rounded weights of frozen blocks: what is rounded, what stays, what trains, and what is refused."""

from __future__ import annotations

import copy
import logging
import sys
from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, SynQTConfig, UnsupportedModelError
from peft_bsr.core import is_quantized
from peft_bsr.cost import model_memory, saved_activations
from peft_bsr.errors import MissingDependencyError
from peft_bsr.ops import FrozenLinear
from peft_bsr.tuners.base import frozen_weights

pytestmark = pytest.mark.sampled(2)

LABELS = torch.tensor([0, 1])
needs_torchao = pytest.mark.usefixtures("torchao")


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="torchao is not installed")


CONFIGS = {
    "full": {"trainable_blocks": [1]},
    "lora": {"trainable_blocks": [1], "trainable": "lora"},
    "stock_blocks": {"trainable_blocks": [1], "lean": "off"},
    "max": {"trainable_blocks": [1], "lean": "max"},
    "int8_activations": {"trainable_blocks": [1], "saved_activations": "int8"},
    "synqt": {"num_queries": 2, "bottleneck": 4, "dropout": 0.0, "drop_path": 0.0},
}


def make_config(key: str, frozen_weights: str = "int8") -> BSRConfig | SynQTConfig:
    settings = {**CONFIGS[key], "frozen_weights": frozen_weights}
    return SynQTConfig(**settings) if key == "synqt" else BSRConfig(**settings, init_weights=False)


@pytest.fixture(params=list(CONFIGS))
def key(request) -> str:
    return request.param


@pytest.fixture(params=["int8", "bfloat16"])
def how(request) -> str:
    if request.param == "int8":
        request.getfixturevalue("torchao")
    return request.param


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def frozen_linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]


def rounded_by_hand(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in full precision whose frozen weights have the rounded values."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if isinstance(module, FrozenLinear):
            module.__class__ = torch.nn.Linear
            in_8_bits = is_quantized(module.weight)  # only the weight is rounded then
            for name, p in list(module.named_parameters()):
                whole = p.dequantize() if is_quantized(p) else p.detach() if in_8_bits else p.float()
                setattr(module, name, torch.nn.Parameter(whole, requires_grad=False))
    return reference


def test_linears_of_frozen_blocks_are_rounded_and_nothing_else(key, how, make_vit):
    base = make_vit()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, make_config(key, how))
    is_synqt = key == "synqt"
    param_modules = ["attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    param_modules += [] if is_synqt else ["attention.k_proj", "attention.v_proj"]
    blocks = (0, 1, 2, 3) if is_synqt else (0, 2, 3)
    expected = {f"base_model.model.vit.layers.{i}.{leaf}" for i in blocks for leaf in param_modules}
    assert set(frozen_linears(model)) == expected
    rounded = set()
    for name, parameter in model.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if is_quantized(parameter) or parameter.dtype == torch.bfloat16:
            rounded.add(name)
            assert not parameter.requires_grad
            if how == "bfloat16":
                assert torch.equal(parameter, before[own].bfloat16())
            else:
                torch.testing.assert_close(parameter.dequantize(), before[own], atol=2e-3, rtol=0)
        elif own in before:
            assert torch.equal(parameter, before[own])
    kinds = ("weight", "bias") if how == "bfloat16" else ("weight",)
    assert rounded == {f"{name}.{kind}" for name in expected for kind in kinds}


def test_gradients_are_those_of_the_rounded_values(key, how, make_vit, images):
    """Without autocast: products are those of the inputs' own dtype."""
    if key == "int8_activations":
        pytest.skip("its gradients are rounded at random")
    model = get_peft_model(make_vit(), make_config(key, how)).train()
    reference = rounded_by_hand(model).train()
    losses = [m(pixel_values=images, labels=LABELS).loss for m in (model, reference)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    expected = dict(reference.named_parameters())
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-5, rtol=1e-3, msg=name)


def test_in_bfloat16_a_step_under_autocast_is_bit_for_bit_that_of_full_weights(key, make_vit, images):
    losses, gradients, logits = [], [], []
    for weights in ("full", "bfloat16"):
        torch.manual_seed(1)
        model = get_peft_model(make_vit(), make_config(key, weights)).train()
        torch.manual_seed(2)
        with autocast():
            loss = model(pixel_values=images, labels=LABELS).loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        with autocast(), torch.no_grad():
            logits.append(model.eval()(pixel_values=images).logits)
    assert torch.equal(*losses)
    assert torch.equal(*logits)
    assert list(gradients[0]) == list(gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


class Casts(TorchDispatchMode):
    """Counts what is cast to bfloat16, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("key", ["full", "stock_blocks", "max"])
def test_in_bfloat16_no_frozen_weight_is_cast(key, make_vit, images):
    found = []
    for weights in ("full", "bfloat16"):
        model = get_peft_model(make_vit(), make_config(key, weights)).train()
        with Casts() as casts, autocast():
            model(pixel_values=images, labels=LABELS)
        found.append(casts.shapes)
    mine = [found[1][shape] for shape in ((32, 32), (64, 32), (32, 64), (64,))]
    assert mine == [4, 1, 1, 1]  # of the trained block: query, key, value, output; both of the MLP; a bias
    assert sum(found[0].values()) - sum(found[1].values()) == 36  # weight and bias of 6 Linear modules in 3 blocks


def test_no_weight_is_kept_for_backward_and_the_model_is_smaller(key, how, make_vit, images):
    """Autograd on torchao's own tensors keeps every crossed weight in full: 10 kB each here."""
    saved, frozen = [], []
    for weights in ("full", how):
        torch.manual_seed(1)
        model = get_peft_model(make_vit(), make_config(key, weights)).train()
        with autocast(how == "bfloat16"):
            saved.append(saved_activations(model, lambda model=model: model(pixel_values=images, labels=LABELS).loss))
        frozen.append(model_memory(model).frozen_bytes)
    assert saved[1] <= 1.02 * saved[0]
    assert frozen[1] < (0.65 if how == "int8" else 0.75) * frozen[0]


def test_in_bfloat16_without_autocast_nothing_is_kept_that_was_made_anew(make_vit, images):
    saved = []
    for weights in ("full", "bfloat16"):
        model = get_peft_model(make_vit(), make_config("stock_blocks", weights)).train()
        saved.append(saved_activations(model, lambda model=model: model(pixel_values=images, labels=LABELS).loss))
    assert saved[1] <= saved[0]


def test_lean_blocks_stay_lean(how, make_vit):
    plans = [get_peft_model(make_vit(), make_config("max", weights)).base_model.plan() for weights in ("full", how)]
    assert plans[0] == plans[1]
    assert all(block.lean is not None for block in plans[1].blocks if block.in_graph)


def test_it_is_reported_once(how, make_vit, caplog):
    said, least, most = {
        "int8": ("in 8 bits take 0.0 MiB instead of 0.1", 1e-4, 5e-2),
        "bfloat16": ("in bfloat16 take 0.0 MiB instead of 0.1", 1e-5, 1e-2),
    }[how]
    with caplog.at_level(logging.INFO, logger="peft_bsr"):
        get_peft_model(make_vit(), make_config("full", how))
    (message,) = [m for m in caplog.messages if "frozen Linear modules" in m]
    assert f"weights of 18 frozen Linear modules {said}; outputs differ by" in message
    assert least < float(message.rsplit(" ", 1)[1]) < most


@pytest.mark.sampled(3)
def test_saved_it_reloads_equal_and_disabled_or_unloaded_it_runs_on_the_rounded_weights(
    key, how, make_vit, images, run, tmp_path
):
    stock = run(make_vit(), images)
    model = get_peft_model(make_vit(), make_config(key, how)).eval()
    model.save_pretrained(tmp_path)
    output = run(model, images)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(make_vit(), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert loaded.peft_config["default"].frozen_weights == how
        torch.testing.assert_close(run(loaded, images), output, atol=1e-6, rtol=1e-6)
    with model.disable_adapter():
        disabled = run(model, images)
    assert not torch.equal(disabled, stock)
    torch.testing.assert_close(disabled, stock, atol=3e-2, rtol=3e-2)
    plain = model.unload()
    assert torch.equal(run(plain, images), disabled)
    assert len(frozen_linears(plain)) == (16 if key == "synqt" else 18)
    again = get_peft_model(plain, make_config(key, how), autocast_adapter_dtype=False)
    assert all(p.dtype == torch.float32 for p in again.parameters() if p.requires_grad)
    assert len(frozen_linears(again)) == len(frozen_linears(plain))
    with autocast():
        assert torch.isfinite(run(again.train(), images)).all()


def test_merged_it_gives_the_same_outputs(how, make_vit, images, run):
    config = make_config("full", how)
    config.keep_rate = 1.0
    model = get_peft_model(make_vit(), config).eval()
    output = run(model, images)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged, images), output, atol=1e-5, rtol=1e-5)
    assert len(frozen_linears(merged)) == 18


def test_adapters_of_one_model_share_its_frozen_weights(how, make_vit, images, run):
    model = get_peft_model(make_vit(), make_config("full", how)).eval()
    output = run(model, images)
    for other, message in (
        ({"frozen_weights": "full"}, rf"needs frozen weights 'full', but .* they are '{how}' in blocks \[0, 2, 3\]\."),
        ({"trainable_blocks": [2]}, rf"needs frozen weights '{how}' in blocks \[0, 1, 3\], but "),
    ):
        settings = {**CONFIGS["full"], "frozen_weights": how, **other}
        with pytest.raises(ConfigError, match=message):
            model.add_adapter("second", BSRConfig(**settings))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", make_config("lora", how))
    model.set_adapter("second")
    assert not torch.equal(run(model.eval(), images), output)
    model.set_adapter("default")
    assert torch.equal(run(model, images), output)
    whole = get_peft_model(make_vit(), make_config("full", "full"))
    with pytest.raises(ConfigError, match="but in this model they are 'full'"):
        whole.add_adapter("second", make_config("full", how))


@needs_torchao
def test_adapters_agree_on_the_kind(make_vit):
    model = get_peft_model(make_vit(), make_config("full", "bfloat16"))
    message = r"needs frozen weights 'int8' in blocks \[0, 2, 3\], but in this model they are 'bfloat16' in "
    with pytest.raises(ConfigError, match=message):
        model.add_adapter("second", make_config("full", "int8"))


def test_the_second_adapter_is_as_lean_as_the_first(how, make_vit):
    """Checked without autocast, where blocks whose weights are in bfloat16 would run as they are."""
    config = make_config("max", how)
    config.reduction_blocks = [1]
    model = get_peft_model(make_vit(), config)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    model.add_adapter("second", config)
    plans = [model.base_model.plan(name) for name in ("default", "second")]
    assert plans[0] == plans[1]
    assert plans[1].blocks[-1].lean.num_queries == 1
    assert {name: p.dtype for name, p in model.named_parameters() if "second" not in name} == dtypes


@needs_torchao
def test_the_compiler_is_left_as_it_is_for_the_rest_of_the_process(make_vit):
    """torchao's own default sets flags of inductor for everything that runs."""
    import torch._inductor.config as inductor

    with inductor.patch(coordinate_descent_tuning=False, force_fuse_int_mm_with_mul=False):
        before = inductor.get_config_copy()
        get_peft_model(make_vit(), make_config("full"))
        assert inductor.get_config_copy() == before


def test_a_copy_trains(how, make_vit, images):
    """A pickle of the whole model is what torchao does not offer; adapters are saved as ever."""
    model = get_peft_model(make_vit(), make_config("full", how))
    reference = copy.deepcopy(model).train()
    assert len(frozen_linears(reference)) == 18
    reference(pixel_values=images, labels=LABELS).loss.backward()
    assert all(p.grad is not None for p in reference.parameters() if p.requires_grad)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.sampled(3)
@needs_torchao
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_8_bits_are_those_of_the_rounded_weights(key, make_vit, images, autocast):
    """Gradients are those of the rounded values and of whole activations, in the same precision."""
    models = []
    for config in (key, "full" if key == "int8_activations" else key):
        torch.manual_seed(1)
        base = make_vit().to(torch.float32 if autocast else torch.bfloat16)
        models.append(get_peft_model(base, make_config(config)).train())
    found = []
    for model in (models[0], rounded_by_hand(models[1]).train()):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(pixel_values=images if autocast else images.bfloat16(), labels=LABELS).loss
        loss.backward()
        found.append(torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad]))
    error = float((found[0] - found[1]).norm() / found[1].norm())
    assert error <= (0.05 if key == "int8_activations" else 0.02)


def test_in_bfloat16_a_pickle_of_the_whole_model_runs(make_vit, images, run, tmp_path):
    model = get_peft_model(make_vit(), make_config("full", "bfloat16")).eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert len(frozen_linears(loaded)) == 18
    assert torch.equal(run(loaded, images), run(model, images))


def test_half_precision_and_autocast(key, how, make_vit, images):
    model = get_peft_model(make_vit(), make_config(key, how)).train()
    with autocast():
        loss = model(pixel_values=images, labels=LABELS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    for dtype in (torch.bfloat16, torch.float32) if how == "bfloat16" else ():
        model = model.to(dtype).train()
        model(pixel_values=images.to(dtype), labels=LABELS).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    model = get_peft_model(make_vit().bfloat16(), make_config(key, how)).train()
    model(pixel_values=images.bfloat16(), labels=LABELS).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_model_in_bfloat16_is_left_as_it_is(key, make_vit, caplog):
    with caplog.at_level(logging.INFO, logger="peft_bsr"):
        model = get_peft_model(make_vit().bfloat16(), make_config(key, "bfloat16"))
    assert frozen_linears(model) == []
    count = 16 if key == "synqt" else 18
    assert f"ViTForImageClassification: {count} frozen Linear modules are in bfloat16 already" in caplog.messages
    model.add_adapter("second", make_config(key, "bfloat16"))


def test_it_is_said_that_there_is_nothing_to_round(how, make_vit, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_bsr"):
        model = get_peft_model(make_vit(), BSRConfig(preset="lora", frozen_weights=how))
    assert frozen_linears(model) == []
    assert f"`frozen_weights={how!r}` rounds nothing, because every block trains" in caplog.text


def test_a_model_in_float16_is_refused_as_it_was(key, make_vit, snapshot, assert_unchanged):
    base = make_vit().half()
    before = snapshot(base)
    with pytest.raises(ConfigError, match="with a model in float16: its weights would take the same"):
        get_peft_model(base, make_config(key, "bfloat16"))
    assert_unchanged(base, before)


def test_without_torchao_the_error_says_so_and_nothing_changes(key, make_vit, monkeypatch, snapshot, assert_unchanged):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    base = make_vit()
    before = snapshot(base)
    with pytest.raises(
        MissingDependencyError, match=r"needs torchao.*Install it with `pip install peft-bsr\[quantization\]`"
    ):
        get_peft_model(base, make_config(key))
    assert_unchanged(base, before)
    assert frozen_linears(get_peft_model(base, make_config(key, "bfloat16")))


def test_a_model_that_rounding_changes_is_refused_as_it_was(how, make_vit, monkeypatch, snapshot, assert_unchanged):
    monkeypatch.setattr(frozen_weights, "_LARGEST_ERROR", 1e-6)
    base = make_vit()
    before = snapshot(base)
    with pytest.raises(UnsupportedModelError, match=r'its outputs differ by .*Use `frozen_weights="full"`'):
        get_peft_model(base, make_config("full", how))
    assert_unchanged(base, before)


def test_bad_values():
    with pytest.raises(ConfigError, match=r"`frozen_weights='int4'` is unknown\. Use one of 'full', 'int8', 'bf"):
        BSRConfig(frozen_weights="int4")
    with pytest.raises(ConfigError, match="`frozen_weights='int4'` is unknown"):
        SynQTConfig(frozen_weights="int4")
    for kind in ("int8", "bfloat16"):
        with pytest.raises(ConfigError, match=f"`frozen_weights='{kind}'` is for blocks that never train"):
            ALaSTConfig(frozen_weights=kind)
