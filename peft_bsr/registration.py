"""Which versions of PEFT are supported, which methods this package has, and its own version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import peft
from packaging.version import Version
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from peft_bsr.compat import peft_api
from peft_bsr.compat.peft_api import extend_peft_type
from peft_bsr.errors import UnsupportedPeftError

OLDEST_PEFT, FIRST_UNTESTED_PEFT = "0.20.0", "0.22.0"
"""Supported: OLDEST_PEFT <= peft < FIRST_UNTESTED_PEFT. A newer one may work; the tests say loudly when it arrives."""

REGISTERED: set[str] = set()
"""`peft_type` of every method of this package."""

peft_api.ignore_gradient_checkpointing_warning()


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


def register_method(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Make a method of this package known to PEFT; see `peft_bsr.compat.peft_api.register_method`."""
    REGISTERED.add(extend_peft_type(name.upper()).value)
    peft_api.register_method(name, config_cls, model_cls)


__all__ = ["REGISTERED", "check_peft_version", "extend_peft_type", "package_version", "register_method"]
