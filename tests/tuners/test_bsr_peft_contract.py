"""What PEFT promises of every method: names, status, files, dtypes, copies, filters."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import (
    AutoPeftModel,
    PeftModel,
    PeftModelForSequenceClassification,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from peft_bsr import AdapterError, AdapterFileError, AdapterNameWarning, BSRConfig, BSRModel

LINEARS = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")} | {"mlp.fc1", "mlp.fc2"}
NORMS = {"layernorm_before", "layernorm_after"}
TRICKY_NAMES = ["other", "attention", "q_proj", "classifier", "layers", "weight", "bsr", "params", "1", "vit.layernorm"]


def saved_keys(folder) -> set[str]:
    return set(load_file(folder / "adapter_model.safetensors"))


def expected_keys(trainable: str, blocks: list[int]) -> set[str]:
    in_blocks = LINEARS if trainable == "lora" else LINEARS | NORMS
    leaves = {f"vit.layers.{block}.{leaf}" for block in blocks for leaf in in_blocks}
    parameters = ("lora_A", "lora_B") if trainable == "lora" else ("weight", "bias")
    keys = {f"{leaf}.bsr_params.{p}" for leaf in leaves for p in parameters}
    keys |= {f"{leaf}.bsr_params.{p}" for leaf in ("vit.layernorm", "classifier") for p in ("weight", "bias")}
    return {f"base_model.model.{key}" for key in keys}


def test_attributes(model):
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, BSRModel)
    assert (model.active_adapter, model.active_adapters, list(model.peft_config)) == (
        "default",
        ["default"],
        ["default"],
    )
    assert model.peft_type == "BSR"
    assert isinstance(model.get_base_model(), ViTForImageClassification)
    for name in (
        "save_pretrained",
        "load_adapter",
        "merge_and_unload",
        "get_layer_status",
        "print_trainable_parameters",
    ):
        assert hasattr(model, name)


def test_adapter_name_is_taken_over(make_vit, make_config):
    model = get_peft_model(make_vit(), make_config(), adapter_name="mine")
    assert (model.active_adapter, list(model.peft_config)) == ("mine", ["mine"])
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"mine"}


def test_parameter_names_follow_pefts_rules(model):
    own = [name for name, _ in model.named_parameters() if "bsr_params" in name]
    assert own == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            assert "bsr_" not in name  # PEFT's delete_adapter would not visit it


def test_status(model, trainable):
    layers = model.get_layer_status()
    weights = [layer for layer in layers if layer.module_type == "bsr.BSRWeights"]
    routers = [layer for layer in layers if layer.module_type == "bsr.BSRRouter"]
    assert (len(weights), len(routers)) == (2 * (6 if trainable == "lora" else 8) + 2, 4)
    for layer in layers:
        assert (layer.enabled, layer.active_adapters, layer.merged_adapters) == (True, ["default"], [])
        assert layer.available_adapters == ["default"]
    assert all(layer.requires_grad == {"default": True} for layer in weights)
    assert all(layer.devices == {"default": ["cpu"]} for layer in weights)
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("ViTForImageClassification", "BSRModel")
    assert status.peft_types == {"default": "BSR"}
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert (status.requires_grad, status.devices) == ({"default": True}, {"default": ["cpu"]})
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.num_adapter_layers == len(layers)


def test_status_of_merged_and_disabled(model):
    model.merge_adapter()
    status = model.get_model_status()
    assert (status.merged_adapters, status.enabled) == (["default"], True)
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    assert model.get_model_status().enabled is True


def test_trainable_parameters_are_the_adapters(model, trainable):
    block = 6 * 2 * 4 if trainable == "lora" else 0
    per_block = (
        4 * (32 * 4 + 4 * 32) + 2 * (32 * 4 + 4 * 64)
        if block
        else 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 64
    )
    assert model.get_nb_trainable_parameters()[0] == 2 * per_block + 64 + (32 * 3 + 3)


def test_file_holds_trained_blocks_norm_and_head_and_no_adapter_name(model, trainable, tmp_path):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert saved_keys(tmp_path) == expected_keys(trainable, [1, 3])
    assert set(get_peft_model_state_dict(model)) == expected_keys(trainable, [1, 3])


def test_save_and_load(model, make_vit, images, run, tmp_path):
    expected = run(model, images)
    assert not torch.allclose(expected, run(make_vit(), images), atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode
    assert loaded.base_model.plan() == model.base_model.plan()
    assert torch.equal(run(loaded.eval(), images), expected)


def test_save_and_load_again_to_train(model, make_vit, images, run, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, is_trainable=True)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == names
    assert torch.equal(run(loaded.eval(), images), run(model, images))


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.AdapterNameWarning")
@pytest.mark.parametrize("saved_as", TRICKY_NAMES[1:4])
@pytest.mark.parametrize("loaded_as", TRICKY_NAMES)
def test_adapter_names_that_are_parts_of_module_names(make_vit, images, run, tmp_path, saved_as, loaded_as):
    if "." in loaded_as:
        pytest.skip("a dot cannot be part of a module's name")
    config = BSRConfig(trainable_blocks=[1, 3], init_weights=False)
    model = get_peft_model(make_vit(), config, adapter_name=saved_as).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path / saved_as
    assert saved_keys(folder) == expected_keys("full", [1, 3])
    loaded = PeftModel.from_pretrained(make_vit(), folder, adapter_name=loaded_as).eval()
    assert list(loaded.peft_config) == [loaded_as]
    assert torch.equal(run(loaded, images), run(model, images))
    loaded.load_adapter(folder, adapter_name="further")
    loaded.set_adapter("further")
    assert torch.equal(run(loaded, images), run(model, images))


def test_adapters_with_names_inside_each_other_keep_their_own_files(
    make_vit, make_config, trainable, run, images, tmp_path
):
    model = get_peft_model(make_vit(), make_config(), adapter_name="a").eval()
    for name in ("ab", "a_b", "proj"):
        model.add_adapter(name, make_config())
    outputs = {}
    for name in model.peft_config:
        model.set_adapter(name)
        outputs[name] = run(model, images)
    model.save_pretrained(tmp_path)
    for name, expected in outputs.items():
        assert saved_keys(tmp_path / name) == expected_keys(trainable, [1, 3])
        assert torch.equal(run(PeftModel.from_pretrained(make_vit(), tmp_path / name).eval(), images), expected)


def test_one_of_several_adapters_called_like_a_module_is_warned_of(model, make_config):
    with pytest.warns(AdapterNameWarning, match=r"Adapters \['q_proj'\] are called like modules"):
        model.add_adapter("q_proj", make_config())


def test_selected_adapters_are_saved(make_vit, make_config, tmp_path):
    model = get_peft_model(make_vit(), make_config())
    for name in ("second", "third"):
        model.add_adapter(name, make_config())
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


def test_low_cpu_mem_usage(model, make_vit, images, run, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(run(loaded, images), run(model, images))
    loaded.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(run(loaded, images), run(model, images))


def test_low_cpu_mem_usage_creates_on_the_meta_device(make_vit, make_config):
    base = make_vit()
    weights = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, make_config(), low_cpu_mem_usage=True)
    assert {p.is_meta for name, p in model.named_parameters() if "bsr_params" in name} == {True}
    kept = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())


@pytest.fixture
def base_folder(make_vit, tmp_path):
    make_vit().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter_folder(base_folder, make_config, tmp_path, images, run):
    """An adapter whose config knows the folder of its base model; beside it, the logits it must give."""
    base = AutoModelForImageClassification.from_pretrained(base_folder)
    model = get_peft_model(base, make_config()).eval()
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)
    torch.save(run(model, images), tmp_path / "logits.pt")
    return tmp_path / "adapter"


@pytest.fixture
def expected_logits(adapter_folder):
    return torch.load(adapter_folder.parent / "logits.pt")


def test_auto_peft_model(adapter_folder, expected_logits, images):
    path = adapter_folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["auto_mapping"] = {
        "base_model_class": "ViTForImageClassification",
        "parent_library": "transformers.models.vit.modeling_vit",
    }
    assert json.loads(path.read_text())["auto_mapping"] == config["auto_mapping"]
    loaded = AutoPeftModel.from_pretrained(adapter_folder).eval()
    assert torch.equal(loaded(pixel_values=images).logits, expected_logits)


def test_transformers_auto_model_reads_an_adapter_folder(adapter_folder, expected_logits, images, run):
    loaded = AutoModelForImageClassification.from_pretrained(adapter_folder).eval()
    assert torch.equal(run(loaded, images), expected_logits)


@pytest.mark.filterwarnings("ignore::peft_bsr.errors.AdapterNameWarning")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_native_load_adapter(adapter_folder, expected_logits, make_vit, images, run, low_cpu_mem_usage):
    model = make_vit()
    stock = run(model, images)
    model.load_adapter(adapter_folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(run(model.eval(), images), expected_logits)
    model.disable_adapters()
    assert torch.equal(run(model, images), stock)
    model.enable_adapters()
    assert torch.equal(run(model, images), expected_logits)
    model.load_adapter(adapter_folder, adapter_name="q_proj")
    assert model.active_adapters() == ["q_proj"]
    assert torch.equal(run(model.eval(), images), expected_logits)


def test_native_add_save_switch_and_delete(make_vit, make_config, images, run, tmp_path, trainable):
    model = make_vit()
    stock = run(model, images)
    outputs = {}
    for name, blocks in (("first", [1, 3]), ("second", [2])):
        model.add_adapter(make_config(trainable_blocks=blocks), adapter_name=name)
        model.set_adapter(name)
        outputs[name] = run(model.eval(), images)
    assert not torch.allclose(outputs["first"], outputs["second"], atol=1e-3)
    model.set_adapter("first")
    assert torch.equal(run(model, images), outputs["first"])
    model.save_pretrained(tmp_path)
    assert saved_keys(tmp_path) == expected_keys(trainable, [1, 3])
    assert torch.equal(run(PeftModel.from_pretrained(make_vit(), tmp_path).eval(), images), outputs["first"])
    model.delete_adapter("second")
    assert torch.equal(run(model, images), outputs["first"])
    model.delete_adapter("first")
    assert torch.equal(run(model, images), stock)


def test_native_delete_of_the_active_adapter_does_not_mix(make_vit, make_config, images, run):
    model = make_vit()
    stock = run(model, images)
    model.add_adapter(make_config(), adapter_name="first")
    model.add_adapter(make_config(trainable_blocks=[2]), adapter_name="second")
    model.set_adapter("second")
    second = run(model, images)
    model.set_adapter("first")
    model.delete_adapter("first")
    output = run(model, images)
    assert torch.equal(output, stock) or torch.equal(output, second)
    model.set_adapter("second")
    assert torch.equal(run(model, images), second)


def test_native_activation_of_two_is_refused(make_vit, make_config):
    model = make_vit()
    model.add_adapter(make_config(), adapter_name="first")
    model.add_adapter(make_config(), adapter_name="second")
    with pytest.raises(AdapterError, match=r"Cannot activate \['first', 'second'\] together"):
        model.set_adapter(["first", "second"])


def test_deepcopy_is_independent(model, images, run, make_vit):
    output = run(model, images)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, images), output)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(run(model, images), output)
    stock = copy.deepcopy(model).unload()
    assert torch.equal(run(stock, images), run(make_vit(), images))
    assert torch.equal(run(model, images), output)


def test_deepcopy_goes_on_training_switching_and_deleting(model, make_config, images, run):
    model.add_adapter("second", make_config(trainable_blocks=[0]))
    twin = copy.deepcopy(model)
    twin.set_adapter("second")
    assert model.active_adapters == ["default"]
    assert {layer.active_adapters[0] for layer in model.get_layer_status()} == {"default"}
    twin.delete_adapter("default")
    assert list(model.peft_config) == ["default", "second"]
    model.set_adapter("default")
    assert model.base_model.plan().trained_blocks == [1, 3]
    assert twin.base_model.plan().trained_blocks == [0]


@pytest.mark.parametrize("through", ["pickle", "torch"])
def test_pickle(model, images, run, make_vit, tmp_path, through):
    output = run(model, images)
    if through == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(twin, images), output)
    assert twin.base_model.plan() == model.base_model.plan()
    assert torch.equal(run(twin.unload(), images), run(make_vit(), images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(make_vit, make_config, images, tmp_path, dtype, autocast_adapter_dtype):
    def trained_dtypes(model):
        return {p.dtype for name, p in model.named_parameters() if "bsr_params" in name}

    settings = {"autocast_adapter_dtype": autocast_adapter_dtype}
    expected_dtype = torch.float32 if autocast_adapter_dtype else dtype
    model = get_peft_model(make_vit().to(dtype), make_config(), **settings)
    assert trained_dtypes(model) == {expected_dtype}
    assert {p.dtype for name, p in model.named_parameters() if "bsr_params" not in name} == {dtype}
    inputs = images.to(dtype)
    output = model.train()(pixel_values=inputs, labels=torch.tensor([0, 1]))
    assert output.logits.dtype == dtype
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.dtype == expected_dtype for g in gradients)
    model.add_adapter("second", make_config(), **settings)
    assert trained_dtypes(model) == {expected_dtype}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit().to(dtype), tmp_path, **settings).eval()
    assert trained_dtypes(loaded) == {expected_dtype}
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=inputs).logits, model.eval()(pixel_values=inputs).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_base_starts_as_the_base_model(make_vit, images, run, trainable, dtype):
    inputs = images.to(dtype)
    expected = run(make_vit().to(dtype), inputs)
    config = BSRConfig(trainable_blocks=[1, 3], trainable=trainable, keep_rate=1.0)
    model = get_peft_model(make_vit().to(dtype), config, autocast_adapter_dtype=False).eval()
    assert torch.equal(run(model, inputs), expected)
    model = get_peft_model(make_vit().to(dtype), config).eval()
    torch.testing.assert_close(run(model, inputs), expected, atol=2e-2, rtol=2e-2)


def test_autocast(model, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(pixel_values=images, labels=torch.tensor([0, 1]))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert any(g.abs().sum() > 0 for g in gradients.values())


@pytest.mark.parametrize("seed", [0, 1])
def test_init_weights(make_vit, make_config, trainable, keep_rate, images, run, seed):
    stock = run(make_vit(), images)
    torch.manual_seed(seed)
    away = get_peft_model(make_vit(), make_config(init_weights=False)).eval()
    start = get_peft_model(make_vit(), make_config(init_weights=True)).eval()
    assert not torch.allclose(run(away, images), stock, atol=1e-2)
    assert torch.equal(run(start, images), stock) == (keep_rate == 1.0)
    if trainable == "lora":
        updates = {name: p for name, p in start.named_parameters() if "lora_" in name}
        assert all((p.abs().sum() == 0) == ("lora_B" in name) for name, p in updates.items())


def test_mixed_batches_are_refused(model, images):
    with pytest.raises(AdapterError, match="asks for several adapters in one batch") as error:
        model(pixel_values=images, adapter_names=["default", "__base__"])
    assert "`adapter_names=['default', '__base__']`" in str(error.value)


def test_lora_scaling_is_alpha_over_r(make_vit, images, run):
    outputs = []
    for alpha, factor in ((8, 1.0), (4, 2.0)):
        config = BSRConfig(trainable_blocks=[3], trainable="lora", keep_rate=1.0, r=4, lora_alpha=alpha)
        model = get_peft_model(make_vit(), config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    parameter.copy_(values * (factor if "lora_B" in name else 1))
        outputs.append(run(model, images))
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], run(make_vit(), images), atol=1e-3)


def test_modules_to_save_takes_the_classifier(make_vit, make_config, images, run, tmp_path):
    model = get_peft_model(make_vit(), make_config(modules_to_save=["classifier"])).eval()
    assert isinstance(model.base_model.model.classifier, ModulesToSaveWrapper)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(0.5)
    expected = run(model, images)
    model(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    keys = saved_keys(tmp_path)
    assert {key for key in keys if "classifier" in key} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, adapter_name="q_proj").eval()
    assert torch.equal(run(loaded, images), expected)
    with model.disable_adapter():
        assert torch.equal(run(model, images), run(make_vit(), images))
    assert torch.equal(run(model.unload(), images), run(make_vit(), images))


@pytest.mark.parametrize("first", [["classifier"], None], ids=["first_saves", "second_saves"])
def test_adapters_with_and_without_modules_to_save_are_combined_or_refused_whole(
    make_vit, images, run, snapshot, assert_unchanged, first
):
    """Either both adapters work side by side, or the second one is refused before anything was changed."""
    settings = {"trainable_blocks": [1, 3], "init_weights": False, "keep_rate": 1.0}
    second = None if first else ["classifier"]
    model = get_peft_model(make_vit(), BSRConfig(**settings, modules_to_save=first)).eval()
    before, output = snapshot(model), run(model, images)
    try:
        model.add_adapter("second", BSRConfig(**settings, modules_to_save=second))
    except ValueError:
        assert_unchanged(model, before)
    else:
        model.set_adapter("second")
        assert not torch.equal(run(model, images), output)
        model.set_adapter("default")
    assert torch.equal(run(model, images), output)
    assert torch.equal(run(model.unload(), images), run(make_vit(), images))


def test_task_type_sequence_classification(make_vit, make_config, images, run, tmp_path):
    model = get_peft_model(make_vit(), make_config(task_type=TaskType.SEQ_CLS)).eval()
    assert isinstance(model, PeftModelForSequenceClassification)
    output = model(pixel_values=images, labels=torch.tensor([0, 1]))
    output.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    assert all(p.grad is not None for p in trained.values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert torch.equal(run(loaded, images), run(model, images))


FILTERS = [
    ({"target_modules": ["q_proj", "v_proj"]}, {"attention.q_proj", "attention.v_proj"}),
    ({"target_modules": ["mlp.fc1"]}, {"mlp.fc1"}),
    ({"target_modules": r".*\.mlp\.fc\d"}, {"mlp.fc1", "mlp.fc2"}),
    ({"exclude_modules": ["fc1", "layernorm_before", "layernorm_after"]}, LINEARS - {"mlp.fc1"}),
    ({"exclude_modules": r".*(attention|layernorm_).*"}, {"mlp.fc1", "mlp.fc2"}),
    ({"target_modules": ["q_proj", "fc1"], "exclude_modules": ["fc1"]}, {"attention.q_proj"}),
]


@pytest.mark.parametrize(("filters", "leaves"), FILTERS, ids=[repr(filters) for filters, _ in FILTERS])
def test_target_and_exclude_modules(make_vit, make_config, trainable, images, filters, leaves):
    model = get_peft_model(make_vit(), make_config(**filters))
    names = {
        n.replace("base_model.model.", "").split(".bsr_params")[0]
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    assert names == {f"vit.layers.{i}.{leaf}" for i in (1, 3) for leaf in leaves} | {"vit.layernorm", "classifier"}
    model.train()(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_exclude_modules_may_name_the_head(make_vit, make_config):
    model = get_peft_model(make_vit(), make_config(exclude_modules=["classifier"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("classifier" in name for name in trained)
    assert any("vit.layernorm" in name for name in trained)
