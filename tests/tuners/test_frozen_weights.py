"""Weights of frozen blocks in 8 bits: what is rounded, what stays, what trains, and what is refused."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, SynQTConfig, UnsupportedModelError
from peft_bsr.core import is_quantized
from peft_bsr.cost import model_memory, saved_activations
from peft_bsr.errors import MissingDependencyError
from peft_bsr.ops import FrozenLinear
from peft_bsr.tuners import frozen_weights

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


def frozen_linears(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]


def rounded_by_hand(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in full precision whose frozen weights have the rounded values."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, FrozenLinear):
            module.__class__ = torch.nn.Linear
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return twin


@needs_torchao
def test_linears_of_frozen_blocks_are_rounded_and_nothing_else(key, make_vit):
    base = make_vit()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, make_config(key))
    is_synqt = key == "synqt"
    leaves = ["attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
    leaves += [] if is_synqt else ["attention.k_proj", "attention.v_proj"]
    blocks = (0, 1, 2, 3) if is_synqt else (0, 2, 3)
    expected = {f"base_model.model.vit.layers.{i}.{leaf}" for i in blocks for leaf in leaves}
    assert set(frozen_linears(model)) == expected
    for name, parameter in model.named_parameters():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if is_quantized(parameter):
            assert name.removesuffix(".weight") in expected
            assert not parameter.requires_grad
            torch.testing.assert_close(parameter.dequantize(), before[own], atol=2e-3, rtol=0)
        elif own in before:
            assert torch.equal(parameter, before[own])


@needs_torchao
def test_gradients_are_those_of_the_rounded_values(key, make_vit, images):
    if key == "int8_activations":
        pytest.skip("its gradients are rounded at random")
    model = get_peft_model(make_vit(), make_config(key)).train()
    twin = rounded_by_hand(model).train()
    losses = [m(pixel_values=images, labels=LABELS).loss for m in (model, twin)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    expected = dict(twin.named_parameters())
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, expected[name].grad, atol=1e-5, rtol=1e-3, msg=name)


@needs_torchao
def test_no_weight_is_kept_for_backward_and_the_model_is_smaller(key, make_vit, images):
    """Autograd on torchao's own tensors keeps every crossed weight in full: 10 kB each here."""
    saved, frozen = [], []
    for weights in ("full", "int8"):
        torch.manual_seed(1)
        model = get_peft_model(make_vit(), make_config(key, weights)).train()
        saved.append(saved_activations(model, lambda model=model: model(pixel_values=images, labels=LABELS).loss))
        frozen.append(model_memory(model).frozen_bytes)
    assert saved[1] <= 1.02 * saved[0]
    assert frozen[1] < 0.65 * frozen[0]


@needs_torchao
def test_lean_blocks_stay_lean(make_vit):
    plans = [get_peft_model(make_vit(), make_config("max", weights)).base_model.plan() for weights in ("full", "int8")]
    assert plans[0] == plans[1]
    assert all(block.lean is not None for block in plans[1].blocks if block.in_graph)


@needs_torchao
def test_it_is_reported_once(make_vit, caplog):
    with caplog.at_level(logging.INFO, logger="peft_bsr"):
        get_peft_model(make_vit(), make_config("full"))
    (message,) = [m for m in caplog.messages if "8 bits take" in m]
    assert "weights of 18 frozen Linear modules in 8 bits take 0.0 MiB instead of 0.1; outputs differ by" in message
    assert 1e-4 < float(message.rsplit(" ", 1)[1]) < 5e-2


@needs_torchao
def test_saved_it_reloads_equal_and_disabled_or_unloaded_it_runs_on_the_rounded_weights(
    key, make_vit, images, run, tmp_path
):
    stock = run(make_vit(), images)
    model = get_peft_model(make_vit(), make_config(key)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert loaded.peft_config["default"].frozen_weights == "int8"
    torch.testing.assert_close(run(loaded, images), run(model, images), atol=1e-6, rtol=1e-6)
    with model.disable_adapter():
        disabled = run(model, images)
    assert not torch.equal(disabled, stock)
    torch.testing.assert_close(disabled, stock, atol=3e-2, rtol=3e-2)
    plain = model.unload()
    assert torch.equal(run(plain, images), disabled)
    assert len(frozen_linears(plain)) == (16 if key == "synqt" else 18)


@needs_torchao
def test_adapters_of_one_model_share_its_frozen_weights(make_vit, images, run, snapshot):
    model = get_peft_model(make_vit(), make_config("full")).eval()
    output = run(model, images)
    for other, message in (
        (
            {"frozen_weights": "full"},
            r"frozen weights of blocks \[\] in 8 bits, but in this model those of blocks \[0, 2, 3\]",
        ),
        ({"trainable_blocks": [2]}, r"frozen weights of blocks \[0, 1, 3\] in 8 bits"),
    ):
        settings = {**CONFIGS["full"], "frozen_weights": "int8", **other}
        with pytest.raises(ConfigError, match=message):
            model.add_adapter("second", BSRConfig(**settings))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", make_config("lora"))
    model.set_adapter("second")
    assert not torch.equal(run(model.eval(), images), output)
    model.set_adapter("default")
    assert torch.equal(run(model, images), output)
    whole = get_peft_model(make_vit(), make_config("full", "full"))
    with pytest.raises(ConfigError, match=r"but in this model those of blocks \[\] are"):
        whole.add_adapter("second", make_config("full"))


@needs_torchao
def test_a_copy_trains(make_vit, images):
    """A pickle of the whole model is what torchao does not offer; adapters are saved as ever."""
    model = get_peft_model(make_vit(), make_config("full"))
    twin = copy.deepcopy(model).train()
    assert len(frozen_linears(twin)) == 18
    twin(pixel_values=images, labels=LABELS).loss.backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert not any(p.grad is not None for p in model.parameters())


@needs_torchao
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_and_autocast(key, make_vit, images, autocast):
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


def test_without_torchao_the_error_says_so_and_nothing_changes(
    key, make_vit, images, run, monkeypatch, snapshot, assert_unchanged
):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    base = make_vit()
    before = snapshot(base)
    with pytest.raises(
        MissingDependencyError, match=r"needs torchao.*Install it with `pip install peft-bsr\[quantization\]`"
    ):
        get_peft_model(base, make_config(key))
    assert_unchanged(base, before)


@needs_torchao
def test_a_model_that_8_bits_change_is_refused_as_it_was(make_vit, monkeypatch, snapshot, assert_unchanged):
    monkeypatch.setattr(frozen_weights, "_LARGEST_ERROR", 1e-5)
    base = make_vit()
    before = snapshot(base)
    with pytest.raises(UnsupportedModelError, match=r'its outputs differ by .*Use `frozen_weights="full"`'):
        get_peft_model(base, make_config("full"))
    assert_unchanged(base, before)


def test_bad_values():
    with pytest.raises(ConfigError, match="`frozen_weights='int4'` is unknown"):
        BSRConfig(frozen_weights="int4")
    with pytest.raises(ConfigError, match="`frozen_weights='int4'` is unknown"):
        SynQTConfig(frozen_weights="int4")
    with pytest.raises(ConfigError, match="for blocks that never train, but here each may"):
        ALaSTConfig(frozen_weights="int8")
