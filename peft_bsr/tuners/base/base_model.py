"""How a model differs from the files that it was loaded from: settings that are kept, weights that are new."""

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
_FACTOR = 16  # by which another size, such as that of images, may grow
_SMALL, _LARGEST = 16.0, 2**16  # numbers up to the first are harmless; where the model has none, up to the second


def own_config(model: nn.Module) -> PreTrainedConfig | None:
    """The configuration in the folder or the cache that a model was loaded from. The Hub is not asked.

    Args:
        model: The base model.

    Returns:
        None where there is none: the model was made in memory, or its files are gone.
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


def changed_settings(config: PreTrainedConfig, own: PreTrainedConfig, *, with_labels: bool = False) -> dict[str, Any]:
    """What of a model's configuration differs from its own file: plain JSON values by name.

    Args:
        config: Of the model, as it is.
        own: From `own_config`.
        with_labels: Whether names of classes count. Default False: an adapter keeps them by itself.
    """
    skipped = _NOT_KEPT | (set() if with_labels else _LABELS)
    before, found = own.to_dict(), {}
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


def with_settings(own: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A model's own configuration with what `changed_settings` found. What it has no name for is left out.

    Args:
        own: Of the base model.
        changes: Names and plain JSON values, as a file has them.

    Raises:
        AdapterFileError: If a changed size would make a far larger model than the base model is.
    """
    if larger := _larger(own.to_dict(), changes):
        name, before, value = larger[0]
        raise AdapterFileError(
            f"The adapter's `base_config` asks for `{name}={value!r}` where the base model has {before!r}: that would "
            "be a far larger model. The file is damaged, or not meant well."
        )
    return type(own).from_dict(_merged(own.to_dict(), changes)) if changes else own


def new_weights(model: nn.Module, own: PreTrainedConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Parameters that cannot be made of the model's own files: name -> (shape, shape in the files).

    A position table that `set_image_size` made of the file's is not among them.

    Args:
        model: The base model.
        own: From `own_config`.
    """
    try:
        with torch.device("meta"):
            stock: Any = type(model)(own)
    except Exception:  # a class of the user's, which is made another way
        return {}
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    resized = resized_tables(model)
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in resized}
    return {name: (shape, shapes[name]) for name, shape in found.items() if shape != shapes.get(name, shape)}


def _larger(own: Mapping[str, Any], changes: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Sizes that grow: (name, own value, changed value)."""
    found = []
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


def _plain(value: Any) -> Any:
    """The value as JSON has it, or `_ABSENT` where it has not."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return _ABSENT


__all__ = ["changed_settings", "new_weights", "own_config", "with_settings"]
