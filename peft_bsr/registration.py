"""Which versions of torch, transformers and peft are supported, which methods this package has, and its version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import peft
from packaging.version import Version
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from peft_bsr.compat import peft_api
from peft_bsr.compat.peft_api import extend_peft_type
from peft_bsr.errors import UnsupportedPeftError

SUPPORTED = {"torch": ("2.7.0", "2.15.0"), "transformers": ("5.18.0", "5.24.0"), "peft": ("0.20.0", "0.22.0")}
"""Package -> (oldest version, first that is not supported), as in pyproject.toml. A newer one may work, but private
interfaces of all three are used: tests/compat names those that changed, docs/compatibility.md what was tried.
"""

REGISTERED: set[str] = set()
"""`peft_type` of every method of this package."""

peft_api.ignore_gradient_checkpointing_warning()


def check_peft_version(version: str = peft.__version__) -> None:
    """Refuse a peft that is too old to load our adapters natively in transformers.

    Raises:
        UnsupportedPeftError: If `version` is older than that.
    """
    oldest = SUPPORTED["peft"][0]
    if Version(version) < Version(oldest):
        raise UnsupportedPeftError(
            f"peft_bsr needs peft >= {oldest}, found {version}. Run `pip install -U 'peft>={oldest}'`."
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
