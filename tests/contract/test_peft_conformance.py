"""PEFT's behaviour for every method, part 1: attributes, names and files. Each test runs for each of our methods."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from methods import METHODS
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from peft_bsr import AdapterFileError, AdapterNameWarning, ALaSTModel, BSRModel, LoSAModel, SynQTModel

pytestmark = pytest.mark.sampled(2)

NEEDS_OWN_KEYS = (
    "peft 0.20 leaves the adapter's name in the keys of nested modules; PeftModel reads them, others do not"
)
HAS_OWN_KEYS = hasattr(BaseTuner, "_remove_adapter_name_from_key")
MODELS = {"BSR": BSRModel, "ALAST": ALaSTModel, "SYNQT": SynQTModel, "LOSA": LoSAModel}
TRICKY_NAMES = {
    "BSR": ["other", "attention", "q_proj", "classifier", "layers", "weight", "bsr", "params", "1"],
    "ALAST": ["other", "attention", "q_proj", "classifier", "alast", "bsr_state", "1"],
    "SYNQT": [
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
    ],
}
SAVED_AS = {
    "BSR": ["attention", "q_proj", "classifier"],
    "ALAST": ["attention"],
    "SYNQT": ["attention", "classifier", "layers"],
}


@pytest.fixture
def needs_own_keys(method):
    if method.is_synqt and not HAS_OWN_KEYS:
        pytest.skip(NEEDS_OWN_KEYS)


def saved_keys(folder: Path) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def test_attributes(model, method):
    assert isinstance(model, PeftModel)
    assert type(model.base_model) is MODELS[method.peft_type]
    assert (model.active_adapter, model.active_adapters, list(model.peft_config)) == (
        "default",
        ["default"],
        ["default"],
    )
    assert model.peft_type == method.peft_type
    assert isinstance(model.get_base_model(), ViTForImageClassification)
    for name in ("save_pretrained", "load_adapter", "merge_and_unload", "print_trainable_parameters"):
        assert hasattr(model, name)
    trained = list(method.blocks) if method.merges else []
    assert model.base_model.plan().trained_blocks == trained
    if not method.merges:
        assert model.base_model.layers() == list(method.blocks)


def test_the_adapters_name_is_taken_over(method, make_vit):
    model = method.attach(make_vit(), "mine")
    assert (model.active_adapter, list(model.peft_config)) == ("mine", ["mine"])
    assert all(f".{method.container}.mine." in name for name, p in model.named_parameters() if p.requires_grad)


def test_parameter_names_follow_pefts_rules(model, method):
    own = [name for name, _ in model.named_parameters() if f"{method.container}.default." in name]
    assert own
    assert own == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if method.is_synqt:
        places = {name.split(".synqt_params")[0].removeprefix("base_model.model.") for name in own}
        assert places == {*(f"vit.layers.{i}.token_router" for i in method.blocks), "classifier"}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            assert method.container.partition("_")[0] + "_" not in name  # PEFT's delete_adapter would not visit it


def test_status(model, method):
    layers = model.get_layer_status()
    kinds = [layer.module_type for layer in layers]
    if method.is_synqt:
        assert sorted(kinds) == 4 * ["synqt.SynQTController"] + ["synqt.SynQTHead"]
    else:
        controller = {"ALAST": "alast.ALaSTController", "LOSA": "losa.LoSAController"}.get(
            method.peft_type, "bsr.BSRController"
        )
        param_modules = len(method.in_blocks)
        assert sorted(kinds) == sorted(
            (len(method.blocks) * param_modules + 2) * ["bsr.BlockWeights"] + 4 * [controller]
        )
        weights = [layer for layer in layers if layer.module_type == "bsr.BlockWeights"]
        assert all(layer.requires_grad == {"default": True} for layer in weights)
        assert all(layer.devices == {"default": ["cpu"]} for layer in weights)
    for layer in layers:
        assert (layer.enabled, layer.active_adapters, layer.merged_adapters) == (True, ["default"], [])
        assert layer.available_adapters == ["default"]
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == (
        "ViTForImageClassification",
        MODELS[method.peft_type].__name__,
    )
    assert status.peft_types == {"default": method.peft_type}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert (status.requires_grad, status.devices) == ({"default": True}, {"default": ["cpu"]})
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.num_adapter_layers == len(layers)


def test_status_of_merged_and_disabled(model, method):
    if method.merges:
        model.merge_adapter()
        status = model.get_model_status()
        assert (status.merged_adapters, status.enabled) == (["default"], True)
        model.unmerge_adapter()
        assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True


def test_trainable_parameters_are_the_adapters(model, method, make_vit):
    own = sum(p.numel() for name, p in model.named_parameters() if method.container in name)
    assert model.get_nb_trainable_parameters()[0] == own
    if not method.is_synqt:
        assert own == method.num_trained(make_vit())


def test_the_file_holds_what_trains_and_no_adapter_name(model, method, tmp_path, needs_own_keys):
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert saved_keys(tmp_path) == method.expected_keys(model) == set(get_peft_model_state_dict(model))
    assert not any("base_layer" in key or "default" in key for key in saved_keys(tmp_path))


def test_the_config_round_trips_with_what_was_chosen(model, method, tmp_path):
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {**method.defaults, "peft_type": method.peft_type}
    if method.is_synqt:
        expected["mode"] = "compact" if method.reduces else None
    assert {name: written[name] for name in expected} == expected
    found = PeftConfig.from_pretrained(tmp_path)
    assert type(found) is method.config_class
    own = {field.name for field in fields(method.config_class)} - {field.name for field in fields(PeftConfig)}
    ours, theirs = (config.to_dict() for config in (model.peft_config["default"], found))
    assert {name: theirs[name] for name in own} == {name: ours[name] for name in own}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(model, method, make_vit, images, run, tmp_path, low_cpu_mem_usage):
    expected = run(model, images)
    assert not torch.allclose(expected, run(make_vit(), images), atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode
    assert loaded.base_model.plan() == model.base_model.plan()
    method.assert_same(run(loaded.eval(), images), expected)
    loaded.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    method.assert_same(run(loaded, images), expected)


def test_save_and_load_again_to_train(model, make_vit, images, run, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, is_trainable=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == names
    assert torch.equal(run(loaded.eval(), images), run(model, images))


def test_a_config_of_a_newer_version_is_read_without_what_is_unknown(model, method, make_vit, images, run, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert any("from_the_future" in str(w.message) for w in caught)
    method.assert_same(run(loaded, images), run(model, images))


@pytest.mark.sampled(5)
@pytest.mark.filterwarnings("ignore::peft_bsr.errors.AdapterNameWarning")
@pytest.mark.parametrize(
    ("key", "saved_as", "loaded_as"),
    [
        (key, saved_as, loaded_as)
        for key in ("bsr_full", "alast", "synqt")
        for saved_as in SAVED_AS[METHODS[key].peft_type]
        for loaded_as in TRICKY_NAMES[METHODS[key].peft_type]
    ],
)
def test_adapter_names_that_are_parts_of_module_names(make_vit, images, run, tmp_path, key, saved_as, loaded_as):
    method = METHODS[key]
    model = method.attach(make_vit(), saved_as)
    model.save_pretrained(tmp_path)
    folder = tmp_path / saved_as
    if not method.is_synqt or HAS_OWN_KEYS:
        assert saved_keys(folder) == method.expected_keys(model, saved_as)
    loaded = PeftModel.from_pretrained(make_vit(), folder, adapter_name=loaded_as).eval()
    assert list(loaded.peft_config) == [loaded_as]
    method.assert_same(run(loaded, images), run(model, images))
    loaded.load_adapter(folder, adapter_name="further")
    loaded.set_adapter("further")
    method.assert_same(run(loaded, images), run(model, images))


def test_adapters_with_names_inside_each_other_keep_their_own_files(method, make_vit, run, images, tmp_path):
    model = method.attach(make_vit(), "a")
    for name in ("ab", "a_b", "proj"):
        model.add_adapter(name, method.config())
    outputs = {}
    for name in model.peft_config:
        model.set_adapter(name)
        outputs[name] = run(model.eval(), images)
    model.save_pretrained(tmp_path)
    for name, expected in outputs.items():
        if not method.is_synqt or HAS_OWN_KEYS:
            assert saved_keys(tmp_path / name) == method.expected_keys(model, name)
        method.assert_same(run(PeftModel.from_pretrained(make_vit(), tmp_path / name).eval(), images), expected)


def test_one_of_several_adapters_called_like_a_module_is_warned_of(model, method):
    with pytest.warns(AdapterNameWarning, match=r"Adapters \['attention'\] have the same names as modules"):
        model.add_adapter("attention", method.config())


def test_selected_adapters_are_saved(model, method, tmp_path):
    for name in ("second", "third"):
        model.add_adapter(name, method.config())
    model.save_pretrained(tmp_path, selected_adapters=["default", "third"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"third"}
    assert (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["fourth"])


def test_pickled_files_are_never_read(model, make_vit, tmp_path):
    model.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="pickled files can run code and are not read"):
        PeftModel.from_pretrained(make_vit(), tmp_path)


def test_low_cpu_mem_usage_creates_on_the_meta_device(method, make_vit):
    base = make_vit()
    weights = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, method.config(), low_cpu_mem_usage=True)
    assert {p.is_meta for name, p in model.named_parameters() if method.container in name} == {True}
    kept = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())


@pytest.fixture
def adapter_folder(method, make_vit, tmp_path, images, run):
    """An adapter folder whose config names the folder of its base model; its expected logits are next to it."""
    make_vit().save_pretrained(tmp_path / "base")
    model = method.attach(AutoModelForImageClassification.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    torch.save(run(model, images), tmp_path / "logits.pt")
    return tmp_path / "adapter"


@pytest.fixture
def expected_logits(adapter_folder):
    return torch.load(adapter_folder.parent / "logits.pt")


def test_auto_peft_model(adapter_folder, expected_logits, method, images, run, needs_own_keys):
    path = adapter_folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"] = {
        "base_model_class": "ViTForImageClassification",
        "parent_library": "transformers.models.vit.modeling_vit",
    }
    path.write_text(json.dumps(config))
    method.assert_same(run(AutoPeftModel.from_pretrained(adapter_folder).eval(), images), expected_logits)


def test_transformers_auto_model_reads_an_adapter_folder(
    adapter_folder, expected_logits, method, images, run, needs_own_keys
):
    loaded = AutoModelForImageClassification.from_pretrained(adapter_folder).eval()
    method.assert_same(run(loaded, images), expected_logits)


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.AdapterNameWarning")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_native_load_adapter(
    adapter_folder, expected_logits, method, make_vit, images, run, low_cpu_mem_usage, needs_own_keys
):
    model = make_vit()
    stock = run(model, images)
    model.load_adapter(adapter_folder, low_cpu_mem_usage=low_cpu_mem_usage)
    method.assert_same(run(model.eval(), images), expected_logits)
    model.disable_adapters()
    method.assert_same(run(model, images), stock)
    model.enable_adapters()
    method.assert_same(run(model, images), expected_logits)
    model.load_adapter(adapter_folder, adapter_name="q_proj")
    assert model.active_adapters() == ["q_proj"]
    method.assert_same(run(model.eval(), images), expected_logits)


def test_native_add_save_switch_and_delete(method, make_vit, images, run, tmp_path, needs_own_keys):
    model = make_vit()
    stock = run(model, images)
    outputs = {}
    for name, settings in (("first", {}), ("second", method.other)):
        model.add_adapter(method.config(**settings), adapter_name=name)
        model.set_adapter(name)
        method.stir(model) if method.is_synqt and name == "first" else None
        outputs[name] = run(model.eval(), images)
    assert not torch.allclose(outputs["first"], outputs["second"], atol=1e-3)
    model.set_adapter("first")
    method.assert_same(run(model, images), outputs["first"])
    model.save_pretrained(tmp_path)
    if not method.is_synqt:
        assert saved_keys(tmp_path) == method.expected_keys(model)
    method.assert_same(run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images), outputs["first"])
    model.delete_adapter("second")
    method.assert_same(run(model, images), outputs["first"])
    model.delete_adapter("first")
    method.assert_same(run(model, images), stock)


def test_native_delete_of_the_active_adapter_does_not_mix(method, make_vit, images, run):
    model = make_vit()
    stock = run(model, images)
    model.add_adapter(method.config(), adapter_name="first")
    model.add_adapter(method.config(**method.other), adapter_name="second")
    model.set_adapter("second")
    second = run(model.eval(), images)
    model.set_adapter("first")
    model.delete_adapter("first")
    output = run(model, images)
    assert any(torch.allclose(output, expected, atol=1e-6) for expected in (stock, second))
    model.set_adapter("second")
    method.assert_same(run(model, images), second)


def test_native_activation_of_two_is_refused(method, make_vit):
    model = make_vit()
    model.add_adapter(method.config(), adapter_name="first")
    model.add_adapter(method.config(), adapter_name="second")
    with pytest.raises(ValueError, match=r"Cannot activate \['first', 'second'\] together"):
        model.set_adapter(["first", "second"])


@pytest.mark.parametrize("key", ["synqt", "synqt_reduced"])
@pytest.mark.skipif(not HAS_OWN_KEYS, reason=NEEDS_OWN_KEYS)
@pytest.mark.parametrize("change", ["layout", "peft 0.20"])
def test_a_file_with_other_names_is_read(make_vit, images, run, tmp_path, key, change):
    """transformers renames modules between versions; peft 0.20 keeps the adapter's name in keys of nested modules."""
    method = METHODS[key]
    model = method.attach(make_vit())
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
    config = tmp_path / "adapter_config.json"  # its digests are those of the original file
    config.write_text(json.dumps({**json.loads(config.read_text()), "digests": None}))
    method.assert_same(run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images), run(model, images))
