"""How a model differs from the files that it was loaded from: changed settings and new weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from peft_bsr.backbones import resized_tables
from peft_bsr.compat.transformers_api import source_of
from peft_bsr.errors import AdapterFileError

_ABSENT = object()
_NOT_KEPT = {"architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype"}
_NOT_KEPT |= {"transformers_version"}
_LABELS = {"id2label", "label2id"}
_SIZES = {"hidden_size", "intermediate_size", "mlp_ratio", "num_attention_heads", "num_hidden_layers"}
_FACTOR = 16  # by which a size, such as the image size, may grow
_SMALL, _LARGEST = 16.0, 2**16  # values up to the first are always allowed; up to the second if the base model has none


def own_config(model: nn.Module) -> PreTrainedConfig | None:
    """The configuration in the folder or the cache from which a model was loaded. The Hub is not accessed.

    Args:
        model: The base model.

    Returns:
        The configuration, or None if the model was created in memory or its files were removed.
    """
    config = getattr(model, "config", None)
    source = source_of(config)
    if not isinstance(config, PreTrainedConfig) or not source:
        return None
    try:
        own: PreTrainedConfig = type(config).from_pretrained(source, local_files_only=True)
        return own
    except Exception:  # transformers', huggingface_hub's and json's own errors
        return None


def changed_settings(
    config: PreTrainedConfig, own: PreTrainedConfig, *, with_labels: bool = False
) -> dict[str, object]:
    """The settings that differ between a model's configuration and its file: name -> plain JSON value.

    Args:
        config: The model's current configuration.
        own: From `own_config`.
        with_labels: Whether to include class names. Default False: an adapter stores them separately.
    """
    skipped = _NOT_KEPT | (set() if with_labels else _LABELS)
    before = own.to_dict()
    found: dict[str, object] = {}
    for name, value in config.to_dict().items():
        if name in skipped or name.startswith("_"):
            continue
        inner, own_inner = getattr(config, name, None), getattr(own, name, None)
        if isinstance(inner, PreTrainedConfig) and isinstance(own_inner, PreTrainedConfig):
            if nested := changed_settings(inner, own_inner):
                found[name] = nested
        elif (plain := _plain(value)) is not _ABSENT and plain != _plain(before.get(name, _ABSENT)):
            found[name] = plain
    return found


def with_settings(own: PreTrainedConfig, changes: Mapping[str, object]) -> PreTrainedConfig:
    """A model's own configuration with the settings from `changed_settings`. Unknown names are ignored.

    Args:
        own: The base model's configuration.
        changes: Name -> plain JSON value.

    Raises:
        AdapterFileError: If a changed size would make the model far larger than the base model.
    """
    if larger := _larger(own.to_dict(), changes):
        name, before, value = larger[0]
        raise AdapterFileError(
            f"The adapter's `base_config` asks for `{name}={value!r}`, but the base model has {before!r}: the model "
            "would be far larger. The file is damaged or malicious."
        )
    return type(own).from_dict(_merged(own.to_dict(), changes)) if changes else own


def new_weights(model: nn.Module, own: PreTrainedConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Parameters that do not come from the model's files: name -> (shape, shape in the files).

    A position table that `set_image_size` interpolated from the file's is not included.

    Args:
        model: The base model.
        own: From `own_config`.
    """
    try:
        with torch.device("meta"):
            stock = type(model)(own)
    except Exception:  # a class of the user's with another constructor
        return {}
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    resized = resized_tables(model)
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in resized}
    return {name: (shape, shapes[name]) for name, shape in found.items() if shape != shapes.get(name, shape)}


def _larger(own: Mapping[str, object], changes: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """Sizes that grow: (name, own value, changed value)."""
    found: list[tuple[str, object, object]] = []
    for name, value in changes.items():
        before = own.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and name not in _LABELS:
            found += _larger(before, value)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                numbers = before if isinstance(before, list) else [before]
                ends = [n for n in numbers if isinstance(n, (int, float))]
                factor = 1 if name in _SIZES else _FACTOR
                if abs(number) > max([factor * abs(n) for n in ends], default=_LARGEST) and abs(number) > _SMALL:
                    found.append((name, before, value))
    return found


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    known = {k: v for k, v in changes.items() if k in values and k not in _NOT_KEPT and not k.startswith("_")}
    inner = {k for k, v in known.items() if k not in _LABELS and isinstance(v, dict) and isinstance(values[k], dict)}
    return values | {k: _merged(values[k], v) if k in inner else v for k, v in known.items()}


def _plain(value: object) -> object:
    """The value as plain JSON, or `_ABSENT` if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return _ABSENT


__all__ = ["changed_settings", "new_weights", "own_config", "with_settings"]
