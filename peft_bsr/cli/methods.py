"""Methods of `--method`: the adapters of this package, and baselines to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_bsr.backbones import probe_model
from peft_bsr.cli.sources import check_names, make_config
from peft_bsr.errors import UsageError
from peft_bsr.tuners import METHODS

BASELINES = {
    "lora": "PEFT's LoRA, r=8, every Linear",
    "full": "full fine-tuning",
    "linear": "the classifier alone",
}
"""Methods that are not adapters of this package, with a description."""

ALL_METHODS = (*METHODS, *BASELINES)
CONFIGS: dict[str, type[PeftConfig]] = {**{name: info.config for name, info in METHODS.items()}, "lora": LoraConfig}
"""Method -> configuration class, whose fields `--set` sets."""


def check_method(method: str, options: Mapping[str, object]) -> None:
    """Check that the method and its options exist, before anything is read or loaded.

    Raises:
        UsageError: If there is no such method or option.
        ConfigError: If the value of an option is invalid.
    """
    if method in METHODS:
        make_config(method, options)
    elif method == "lora":
        check_names(options, [field.name for field in fields(LoraConfig) if field.init], "option of LoraConfig")
    elif method not in BASELINES:
        raise UsageError(f"`--method {method}` is unknown. Use one of {', '.join(ALL_METHODS)}.")
    elif options:
        raise UsageError(f"`--method {method}` has no options, but `--set` gives {', '.join(options)}.")


def config_of(method: str, base: nn.Module, options: Mapping[str, object]) -> PeftConfig | None:
    """Configuration of the adapter, or None if the method has no adapter.

    Args:
        method: One of `ALL_METHODS`.
        base: Image classifier of transformers.
        options: Fields of the method's configuration.
    """
    if method in METHODS:
        config: PeftConfig = make_config(method, options)
        return config
    if method != "lora":
        return None
    standard = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "modules_to_save": _head(base)}
    return LoraConfig(**(standard | dict(options)))


def attach(method: str, base: nn.Module, options: Mapping[str, object]) -> PeftModel | PreTrainedModel:
    """Prepare a model for a method: attach its adapter to `base`, or set `requires_grad` on the parameters of `base`.

    Args:
        method: One of `ALL_METHODS`.
        base: Image classifier of transformers.
        options: Fields of the method's configuration.
    """
    config = config_of(method, base, options)
    if config is not None:
        return get_peft_model(base, config)
    base.requires_grad_(method == "full")
    for name in _head(base) if method == "linear" else ():
        base.get_submodule(name).requires_grad_(True)
    return base


def _head(base: nn.Module) -> list[str]:
    """Names of the Linear modules after the last block."""
    return [name for name in probe_model(base.eval()).head if isinstance(base.get_submodule(name), nn.Linear)]


__all__ = ["ALL_METHODS", "BASELINES", "CONFIGS", "attach", "check_method", "config_of"]
