"""What the package uses of PEFT without a promise. A test that fails names what a new release took away or changed."""

from __future__ import annotations

import enum
import inspect
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import peft_bsr
from peft_bsr.compat import peft_api

TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
# methods of PEFT that the package overrides; those of `LATER` came with peft 0.21
LATER = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load", "_remove_adapter_name_from_key")
METHODS = {
    BaseTuner: (
        "_check_target_module_exists",
        "_create_and_replace",
        "_prepare_adapter_config",
        "_replace_module",
        "_unload_and_optionally_merge",
        *LATER,
    ),
    BaseTunerLayer: ("_get_available_adapters", "_move_adapter_to_device_of_base_layer"),
}
CASES = [(cls, name) for cls, names in METHODS.items() for name in names]


class Layer(nn.Module, BaseTunerLayer):
    adapter_layer_names = ("held",)

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ModuleDict()


@pytest.mark.parametrize(("cls", "name"), CASES, ids=[name for _, name in CASES])
def test_methods_that_are_overridden_exist_and_take_the_same(cls, name):
    """Else PEFT would no longer call ours, silently."""
    if name in LATER and not peft_api.TRANSLATES_KEYS:
        pytest.skip("came with peft 0.21")
    ours = [sub for sub in _subclasses(cls) if name in vars(sub) and sub.__module__.startswith("peft_bsr.")]
    assert ours, "nothing overrides it any more: take it out of this list"
    for sub in ours:
        found, expected = _parameters(sub, name), _parameters(cls, name)
        assert found == expected or (found[-1] == "kwargs" and found[:-1] == expected[: len(found) - 1]), sub


def _parameters(cls, name):
    return [parameter for parameter in inspect.signature(getattr(cls, name)).parameters if parameter != "self"]


def _subclasses(cls):
    return [sub for child in cls.__subclasses__() for sub in (child, *_subclasses(child))]


def test_enable_peft_forward_hooks():
    parameters = inspect.signature(peft.PeftModel._enable_peft_forward_hooks).parameters
    assert list(parameters) == ["self", "args", "kwargs"]
    assert "self.base_model._enable_peft_forward_hooks" in inspect.getsource(peft.PeftModel)


def test_state_of_a_layer():
    layer = Layer()
    assert layer._disable_adapters is False and layer._active_adapter == "default" and layer.merged_adapters == []
    layer.enable_adapters(False)
    assert layer._disable_adapters is True


def test_extend_peft_type():
    assert type(PeftType) is enum.EnumMeta and issubclass(PeftType, str)
    assert peft_api.extend_peft_type("BSR") is PeftType("BSR") is PeftType["BSR"]


def test_register_method(monkeypatch):
    maps = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
    for name in maps:
        assert getattr(peft.mapping, name) is getattr(peft_api, name)
        monkeypatch.setitem(getattr(peft.mapping, name), PeftType.BSR, None)
    peft_api.register_method("bsr", peft_bsr.BSRConfig, peft_bsr.BSRModel)
    assert peft_api.config_class("BSR") is peft_bsr.BSRConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BSR] is peft_bsr.BSRModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.BSR] == "bsr_"
    parameters = inspect.signature(peft_api.register_peft_method).parameters
    assert set(parameters) >= {"name", "config_cls", "model_cls", "prefix"}


def test_buffer_dict():
    held = peft_api.BufferDict(persistent=True)
    held["one"] = torch.ones(2)
    assert list(held.state_dict()) == ["one"] and "one" in held
    del held["one"]
    assert not held.state_dict()


def test_excluded_module():
    assert not peft_api.ExcludedModule()


def test_cast_input_dtype():
    layer = Layer()
    assert peft_api.cast_input_dtype(layer, torch.zeros(1), torch.bfloat16).dtype is torch.bfloat16
    layer.cast_input_dtype_enabled = False
    assert peft_api.cast_input_dtype(layer, torch.zeros(1), torch.bfloat16).dtype is torch.float32


def test_cast_adapter():
    layer = Layer()
    layer.held["a"] = nn.Linear(1, 1, dtype=torch.bfloat16)
    peft_api.cast_adapter(SimpleNamespace(model=layer), "a")
    assert layer.held["a"].weight.dtype is torch.float32


def test_check_adapters_to_merge():
    layer = Layer()
    layer.set_adapter(["a"])
    assert peft_api.check_adapters_to_merge(layer, None) == ["a"]
    layer.merged_adapters = ["a"]
    with pytest.warns(UserWarning, match="a"):
        assert peft_api.check_adapters_to_merge(layer, ["a"]) == []


def test_disabled_layers():
    layer = Layer()
    with peft_api.disabled_layers([layer]):
        assert layer.disable_adapters
    assert not layer.disable_adapters


@pytest.fixture(scope="module")
def wrapped():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])
    return get_peft_model(ViTForImageClassification(ViTConfig(**TINY)), config)


def test_modules_to_save_wrapper(wrapped):
    layer = wrapped.base_model.model.classifier
    assert isinstance(layer, peft_api.ModulesToSaveWrapper) and isinstance(layer, peft_api.AuxiliaryTrainingWrapper)
    assert list(layer.modules_to_save) == ["default"]
    assert isinstance(layer.original_module, nn.Linear)


def test_ignore_gradient_checkpointing_warning():
    """Of the way in which transformers warns: at its own line, whoever asks."""
    model = ViTForImageClassification(ViTConfig(**TINY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_api.ignore_gradient_checkpointing_warning()
        assert getattr(model, "is_gradient_checkpointing", False) is False


def test_the_method_of_a_file_is_read_before_its_configuration(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    assert peft_api.peft_type_of(str(tmp_path), revision=None, token=None) == "LORA"
