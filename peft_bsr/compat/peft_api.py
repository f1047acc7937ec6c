"""Private interfaces of peft that the package uses. Tested with peft 0.20.0 and 0.21.2.

Private methods of peft's tuners and layers that the package overrides are in its own classes;
tests/compat/test_peft_api.py checks their names and parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

ExcludedModule = _ExcludedModule
"""What `_check_target_module_exists` returns for an excluded module, as opposed to one that is not a target."""

cast_input_dtype = BaseTunerLayer._cast_input_dtype
"""`(layer, tensor, dtype) -> tensor`: cast an input, unless the user has disabled casting for the layer."""

cast_adapter = BaseTuner._cast_adapter_dtype
"""`(tuner, adapter_name)`: cast an adapter in half precision to float32, as PEFT does after creating a tuner."""

TRANSLATES_KEYS = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")
"""Whether a tuner can rename the keys of an adapter file while it is loaded (peft 0.21 and later)."""


def extend_peft_type(name: str) -> PeftType:
    """Add `name` to the enum `PeftType`, or return the existing member.

    PEFT has no public way to do this: a plain string or a foreign enum passes `get_peft_model` but breaks
    transformers' native `load_adapter` and `AutoModel.from_pretrained` on an adapter folder.

    Args:
        name: Upper-case method name, equal to the member's value, for example `"BSR"`.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)  # EnumMeta.__setattr__ refuses; since 3.12 attribute access needs it
    return member


def register_method(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a method with PEFT. Safe to call again, also after this package was re-imported.

    Args:
        name: Lower-case method name.
        config_cls: The `PeftConfig` subclass.
        model_cls: The `BaseTuner` subclass; its `prefix` marks trainable parameters.
    """
    peft_type = extend_peft_type(name.upper())
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING:  # a re-import created new classes, which replace the old ones
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
        return
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)


def config_class(peft_type: PeftType | str) -> type[PeftConfig]:
    """The configuration class of a registered method.

    Raises:
        KeyError: If the method is not registered.
    """
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def peft_type_of(name: str, **options: object) -> str:
    """The method named in an adapter's `adapter_config.json`, read without creating a configuration.

    Args:
        name: Folder or Hub id.
        **options: Arguments of `hf_hub_download`.
    """
    return str(PeftConfig._get_peft_type(name, **options))


@contextmanager
def disabled_layers(layers: Iterable[BaseTunerLayer]) -> Iterator[None]:
    """Context manager: some tuner layers are disabled. `enable_adapters` would also change `requires_grad`.

    Args:
        layers: Tuner layers, enabled.
    """
    layers = list(layers)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def ignore_gradient_checkpointing_warning() -> None:
    """Ignore transformers' warning that `is_gradient_checkpointing` is deprecated (5.24 and later).

    `PeftModel.__init__` reads the attribute whenever an adapter is attached, which users cannot change. transformers
    reports its own line as the origin of the warning, so it is also ignored for all other code.
    """
    place = r"transformers\.modeling_utils$"
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning, place)


__all__ = [
    "TRANSLATES_KEYS",
    "AuxiliaryTrainingWrapper",
    "BufferDict",
    "ExcludedModule",
    "ModulesToSaveWrapper",
    "cast_adapter",
    "cast_input_dtype",
    "check_adapters_to_merge",
    "config_class",
    "disabled_layers",
    "extend_peft_type",
    "ignore_gradient_checkpointing_warning",
    "peft_type_of",
    "register_method",
]
