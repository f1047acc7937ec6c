"""The one place that extends PEFT: adds our method names to its closed enum `PeftType` and registers the tuners."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

import peft
from packaging.version import Version
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

from peft_bsr.errors import UnsupportedPeftError

OLDEST_PEFT, FIRST_UNTESTED_PEFT = "0.20.0", "0.22.0"
"""Supported: OLDEST_PEFT <= peft < FIRST_UNTESTED_PEFT. A newer one may work; the tests say loudly when it arrives."""

REGISTERED: set[str] = set()
"""`peft_type` of every method of this package."""

# PEFT asks each model by this old name; a user can change nothing about it
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def check_peft_version(version: str = peft.__version__) -> None:
    """Refuse a peft that is too old to load our adapters natively in transformers.

    Raises:
        UnsupportedPeftError: If `version` is older than `OLDEST_PEFT`.
    """
    if Version(version) < Version(OLDEST_PEFT):
        raise UnsupportedPeftError(
            f"peft_bsr needs peft >= {OLDEST_PEFT}, found {version}. Run `pip install -U 'peft>={OLDEST_PEFT}'`."
        )


def package_version() -> str:
    """Version of this package as it is installed, or `"unknown"` where it runs from a folder."""
    try:
        return version("peft-bsr")
    except PackageNotFoundError:
        return "unknown"


def extend_peft_type(name: str) -> PeftType:
    """Add `name` to the enum `PeftType`, or return the member if it is there.

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
    """Make a method known to PEFT. Safe to call again, also after this package was imported anew.

    Args:
        name: Lower-case method name.
        config_cls: The `PeftConfig` subclass.
        model_cls: The `BaseTuner` subclass; its `prefix` marks trained parameters.
    """
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    peft_type = extend_peft_type(name.upper())
    REGISTERED.add(peft_type.value)
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING:  # a re-import made new classes: they replace the old ones
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
        return
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
