"""What PEFT promises of every method, for SynQT: names, status, files, dtypes, copies; merging is refused."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from peft_bsr import AdapterError, SynQTConfig, SynQTModel

NEEDS_OWN_KEYS = pytest.mark.skipif(
    not hasattr(BaseTuner, "_remove_adapter_name_from_key"),
    reason="peft 0.20 leaves the adapter's name in the keys of nested modules; PeftModel reads them, others do not",
)
TRICKY_NAMES = [
    "other",
    "attention",
    "classifier",
    "layers",
    "weight",
    "synqt",
    "params",
    "1",
    "prompts",
    "token_router",
]


@pytest.fixture
def make_config(keep_rate):
    def make(**settings):
        defaults = {"num_queries": 2, "bottleneck": 4, "attention_bottleneck": 2, "layers": [0, 2, 3]}
        return SynQTConfig(**{**defaults, "keep_rate": keep_rate, **settings})

    return make


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Torch multiplies in another order where a weight requires no gradient."""
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def stir(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Away from the start, where adapters are the identity; each adapter elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "synqt_params" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def model(make_vit, make_config):
    return stir(get_peft_model(make_vit(), make_config()))


def saved_keys(folder) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def expected_keys(model) -> set[str]:
    names = (name for name, p in model.named_parameters() if "synqt_params" in name)
    return {name.replace(".synqt_params.default.", ".synqt_params.") for name in names}


def test_attributes(model):
    assert isinstance(model.base_model, SynQTModel)
    assert (model.active_adapter, list(model.peft_config), model.peft_type) == ("default", ["default"], "SYNQT")
    assert model.base_model.layers() == [0, 2, 3]
    assert model.base_model.plan().trained_blocks == []


def test_only_side_modules_and_head_train_and_are_named_by_pefts_rules(model):
    own = [name for name, _ in model.named_parameters() if "synqt_params.default." in name]
    assert own == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    places = {name.split(".synqt_params")[0].removeprefix("base_model.model.") for name in own}
    assert places == {*(f"vit.layers.{i}.token_router" for i in (0, 2, 3)), "classifier"}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            assert "synqt_" not in name  # PEFT's delete_adapter would not visit it


def test_status(model):
    layers = model.get_layer_status()
    assert sorted(layer.module_type for layer in layers) == ["synqt.SynQTHead"] + 4 * ["synqt.SynQTRouter"]
    for layer in layers:
        assert (layer.enabled, layer.active_adapters, layer.merged_adapters) == (True, ["default"], [])
        assert layer.available_adapters == ["default"]
    status = model.get_model_status()
    assert status.peft_types == {"default": "SYNQT"}
    assert (status.enabled, status.requires_grad, status.devices) == (True, {"default": True}, {"default": ["cpu"]})
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@NEEDS_OWN_KEYS
def test_the_file_holds_side_modules_and_head_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert saved_keys(tmp_path) == expected_keys(model) == set(get_peft_model_state_dict(model))
    assert not any("base_layer" in key or "q_proj" in key or "default" in key for key in saved_keys(tmp_path))


def test_the_config_round_trips_with_what_was_chosen(model, tmp_path, keep_rate):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["num_queries"], config["layers"], config["keep_rate"]) == (2, [0, 2, 3], keep_rate)
    assert config["mode"] == ("compact" if keep_rate < 1 else None)
    assert isinstance(SynQTConfig.from_pretrained(tmp_path), SynQTConfig)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(model, make_vit, images, run, tmp_path, low_cpu_mem_usage):
    expected = run(model, images)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    assert loaded.base_model.plan() == model.base_model.plan()
    assert_same(run(loaded.eval(), images), expected)
    loaded.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert_same(run(loaded, images), expected)


def test_save_and_load_again_to_train(model, make_vit, images, run, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert torch.equal(run(loaded.eval(), images), run(model, images))


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.AdapterNameWarning")
@pytest.mark.parametrize("saved_as", TRICKY_NAMES[1:4])
@pytest.mark.parametrize("loaded_as", TRICKY_NAMES)
def test_adapter_names_that_are_parts_of_module_names(make_vit, images, run, tmp_path, saved_as, loaded_as):
    config = SynQTConfig(num_queries=2, bottleneck=4, attention_bottleneck=2)
    model = stir(get_peft_model(make_vit(), config, adapter_name=saved_as))
    model.save_pretrained(tmp_path)
    folder = tmp_path / saved_as
    loaded = PeftModel.from_pretrained(make_vit(), folder, adapter_name=loaded_as).eval()
    assert list(loaded.peft_config) == [loaded_as]
    assert_same(run(loaded, images), run(model, images))


def test_several_adapters_are_added_switched_saved_and_deleted(model, make_vit, make_config, images, run, tmp_path):
    outputs = {"default": run(model, images)}
    for seed, (name, settings) in enumerate({"second": {"layers": [1]}, "third": {"num_queries": 5}}.items()):
        torch.manual_seed(seed)
        model.add_adapter(name, make_config(**settings))
        model.set_adapter(name)
        outputs[name] = run(model.eval(), images)
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == 3
    for name, expected in outputs.items():
        model.set_adapter(name)
        assert_same(run(model, images), expected)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if f"synqt_params.{name}." in n}
    model.save_pretrained(tmp_path)
    for name, expected in outputs.items():
        folder = tmp_path if name == "default" else tmp_path / name
        assert_same(run(PeftModel.from_pretrained(make_vit(), folder).eval(), images), expected)
    model.delete_adapter("second")
    assert_same(run(model, images), outputs["third"])
    with pytest.warns(UserWarning, match="'third' was active and is deleted; 'default' is active now"):
        model.delete_adapter("third")
    assert_same(run(model, images), outputs["default"])
    assert_same(run(model.unload(), images), run(make_vit(), images))


def test_disabled_and_unloaded_it_is_the_base_model(model, make_vit, images, run, snapshot, assert_unchanged):
    stock = make_vit()
    for p in stock.parameters():
        p.requires_grad_(False)
    before = snapshot(stock)
    expected = run(stock, images)
    assert not torch.allclose(run(model, images), expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(run(model, images), expected)
        model.train()
        assert all(m.training for m in model.get_base_model().vit.layers[0].children())
    model.eval()
    unloaded = model.unload()
    assert torch.equal(run(unloaded, images), expected)
    modules = {n: (*state[:-1],) for n, state in snapshot(unloaded)["modules"].items()}
    assert {n: s[:4] for n, s in modules.items()} == {n: s[:4] for n, s in before["modules"].items()}
    assert list(unloaded.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_the_reason_and_changes_nothing(model, images, run, call, snapshot, assert_unchanged):
    before, expected = snapshot(model), run(model, images)
    with pytest.raises(AdapterError, match="cannot be merged: its queries and its head compute beside the backbone"):
        getattr(model, call)()
    assert_unchanged(model, before)
    assert torch.equal(run(model, images), expected)


def test_mixed_batches_and_two_active_adapters_are_refused(model, make_config, images):
    with pytest.raises(AdapterError, match="asks for several adapters in one batch"):
        model(pixel_values=images, adapter_names=["default", "__base__"])
    model.add_adapter("second", make_config())
    with pytest.raises(AdapterError, match=r"Cannot activate \['default', 'second'\] together"):
        model.base_model.set_adapter(["default", "second"])


@NEEDS_OWN_KEYS
def test_auto_classes(make_vit, make_config, images, run, tmp_path):
    make_vit().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model = stir(get_peft_model(base, make_config()))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"] = {
        "base_model_class": "ViTForImageClassification",
        "parent_library": "transformers.models.vit.modeling_vit",
    }
    path.write_text(json.dumps(config))
    assert_same(run(AutoPeftModel.from_pretrained(path.parent).eval(), images), run(model, images))
    native = AutoModelForImageClassification.from_pretrained(path.parent).eval()
    assert_same(run(native, images), run(model, images))


@NEEDS_OWN_KEYS
def test_native_add_load_switch_and_delete(model, make_vit, make_config, images, run, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    native = make_vit()
    stock = run(native, images)
    native.load_adapter(tmp_path / "adapter")
    assert_same(run(native.eval(), images), run(model, images))
    native.add_adapter(make_config(layers=[1]), adapter_name="second")
    native.set_adapter("second")
    assert not torch.allclose(run(native.eval(), images), run(model, images), atol=1e-3)
    native.set_adapter("default")
    assert_same(run(native, images), run(model, images))
    native.disable_adapters()
    assert_same(run(native, images), stock)
    native.enable_adapters()
    for name in ("second", "default"):
        native.delete_adapter(name)
    assert_same(run(native, images), stock)


def test_deepcopy_is_independent(model, images, run, make_vit):
    output = run(model, images)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, images), output)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(run(model, images), output)
    assert torch.equal(run(copy.deepcopy(model).unload(), images), run(make_vit(), images))


def test_pickle(model, images, run, make_vit):
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, images), run(model, images))
    assert torch.equal(run(twin.unload(), images), run(make_vit(), images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(make_vit, make_config, images, tmp_path, dtype, autocast_adapter_dtype):
    def trained_dtypes(model):
        return {p.dtype for name, p in model.named_parameters() if "synqt_params" in name}

    settings = {"autocast_adapter_dtype": autocast_adapter_dtype}
    expected_dtype = torch.float32 if autocast_adapter_dtype else dtype
    model = get_peft_model(make_vit().to(dtype), make_config(), **settings)
    assert trained_dtypes(model) == {expected_dtype}
    inputs = images.to(dtype)
    output = model.train()(pixel_values=inputs, labels=torch.tensor([0, 1]))
    assert output.logits.dtype == dtype
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.dtype == expected_dtype for g in gradients)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit().to(dtype), tmp_path, **settings).eval()
    assert trained_dtypes(loaded) == {expected_dtype}
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=inputs).logits, model.eval()(pixel_values=inputs).logits)


def test_half_precision_is_near_full(make_vit, make_config, images, run):
    expected = run(stir(get_peft_model(make_vit(), make_config(keep_rate=1.0))), images)
    half = stir(get_peft_model(make_vit().bfloat16(), make_config(keep_rate=1.0)))
    torch.manual_seed(0)
    whole = get_peft_model(make_vit(), make_config(keep_rate=1.0))
    whole.load_state_dict({n: t.float() for n, t in half.state_dict().items()})
    found = run(half, images.bfloat16()).float()
    torch.testing.assert_close(found, run(whole.eval(), images), atol=5e-2, rtol=5e-2)
    assert expected.shape == found.shape


def test_autocast(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(pixel_values=images, labels=torch.tensor([0, 1]))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())


def test_low_cpu_mem_usage_creates_on_the_meta_device(make_vit, make_config):
    model = get_peft_model(make_vit(), make_config(), low_cpu_mem_usage=True)
    assert {p.is_meta for name, p in model.named_parameters() if "synqt_params" in name} == {True}
    assert not any(p.is_meta for name, p in model.named_parameters() if "synqt_params" not in name)


@NEEDS_OWN_KEYS
@pytest.mark.parametrize("change", ["layout", "peft 0.20"])
def test_a_file_with_other_names_is_read(model, make_vit, images, run, tmp_path, change):
    """transformers renames modules between versions; peft 0.20 leaves the adapter's name in keys of nested modules."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    names = {"vit.layers.": "vit.encoder.layer.", ".classifier.synqt": ".head.synqt"}
    if change == "peft 0.20":
        names = {
            f".synqt_params.{n}.": f".synqt_params.saved.{n}." for n in ("norm1", "query", "adapter", "classifier")
        }
    other = {}
    for key, tensor in load_file(path).items():
        for old, new in names.items():
            key = key.replace(old, new)
        other[key] = tensor
    assert set(other) != saved_keys(tmp_path)
    save_file(other, path)
    assert_same(run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images), run(model, images))


def test_gradient_checkpointing_changes_nothing(make_vit, make_config, images):
    gradients = []
    for use_reentrant in (None, True, False):
        base = make_vit()
        torch.manual_seed(2)
        if use_reentrant is not None:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = stir(get_peft_model(base, make_config(dropout=0.0, drop_path=0.0))).train()
        model(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], expected, msg=name)


def test_two_forwards_before_a_backward(model, images):
    model.train()
    for module in model.modules():
        for rate in ("rate", "drop_path"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    halves = [images, images.flip(0) * 2]
    losses = [model(pixel_values=x, labels=torch.tensor([0, 1])).loss for x in halves]
    sum(losses).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for x in halves:
        model(pixel_values=x, labels=torch.tensor([0, 1])).loss.backward()
    for name, expected in together.items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, msg=name)
