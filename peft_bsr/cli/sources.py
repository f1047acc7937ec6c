"""MODEL on the command line: which kind it is, and the model it names."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch
import transformers
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from peft_bsr.backbones import BackboneForImageClassification, BackboneWithHeadConfig, set_image_size, takes_head
from peft_bsr.cli.values import read_fields
from peft_bsr.compat.transformers_api import classifiers_of
from peft_bsr.errors import UnsupportedModelError, UsageError
from peft_bsr.hub import read_config
from peft_bsr.hub.files import ADAPTER, MODEL, list_files
from peft_bsr.problem_type import SINGLE_LABEL, ProblemType
from peft_bsr.tuners import METHODS


def find_adapter(name: str) -> PeftConfig | None:
    """The adapter's configuration, or None where MODEL is a model.

    Args:
        name: MODEL.

    Raises:
        HubError: If there is no such folder and no such repository, or if the Hub does not answer.
        UsageError: If it is neither a model nor an adapter.
    """
    files = list_files(name)
    if ADAPTER in files:
        return read_config(name)
    if MODEL in files:
        return None
    raise UsageError(f"`{name}` has neither {MODEL} nor {ADAPTER}.")


def read_model_config(name: str) -> Any:
    """A model's configuration.

    Args:
        name: MODEL, a model.

    Raises:
        UsageError: If there is none.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UsageError(f"`{name}` is neither a local folder nor a model on the Hub: {reason}") from error


def model_of(adapter: PeftConfig | None, name: str) -> str:
    """The model itself: MODEL, or the base model of the adapter that it is."""
    return name if adapter is None else str(adapter.base_model_name_or_path)


def make_model(
    name: str, labels: int | None = None, device: str = "cpu", image_size: int | tuple[int, int] | None = None
) -> nn.Module:
    """A model of that configuration with random weights: nothing is downloaded but the configuration.

    Args:
        name: MODEL, a model.
        labels: Classes of its head. Default: those of the configuration.
        device: `"meta"` for none at all.
        image_size: Pixels, see `peft_bsr.set_image_size`. Default: those of the configuration.
    """
    config = read_model_config(name)
    if labels is not None:
        config.num_labels = labels
    with torch.device(device):
        model = from_config(config)
    if image_size is not None:
        set_image_size(model, image_size)
    return model


def from_config(config: Any) -> nn.Module:
    """A model with random weights: a classifier where its family has one."""
    own: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
    made: nn.Module
    if takes_head(config):
        with suppress(UnsupportedModelError):  # the bare model's own refusal says more
            return BackboneForImageClassification(BackboneWithHeadConfig(config, num_labels=config.num_labels))
    if classifiers_of(config):
        made = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    elif isinstance(own, type) and issubclass(own, transformers.PreTrainedModel):
        made = own(config)
    else:
        made = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return made


def load_model(
    name: str,
    labels: Sequence[str],
    problem_type: ProblemType = SINGLE_LABEL,
    image_size: int | tuple[int, int] | None = None,
) -> Any:
    """A model with its weights and a head for `labels`.

    A distilled checkpoint, whose own class takes no labels, becomes the plain classifier of its family.

    Args:
        name: MODEL, a model.
        labels: Names of the classes, or of the values.
        problem_type: What they are.
        image_size: Pixels, see `peft_bsr.set_image_size`. Default: the model's own.

    Raises:
        UsageError: If it cannot be loaded, or no classifier of its family takes labels.
    """
    try:
        model = _trainable_class(name).from_pretrained(
            name,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type=problem_type,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"`{name}` cannot be loaded: {str(error).strip().splitlines()[0][:200]}") from error
    if image_size is not None:
        set_image_size(model, image_size)
    return model


def describe_head(name: str, model: Any) -> str | None:
    """One line about the head that a model without one got, or None.

    Args:
        name: MODEL.
        model: From `load_model`.
    """
    if not isinstance(model, BackboneForImageClassification) or not takes_head(read_model_config(name)):
        return None
    return f"{name} has no head: {model.describe_head()}"


def _trainable_class(name: str) -> Any:
    """The image classifier of the model's family that can be trained: its loss is made of labels."""
    config = read_model_config(name)
    classes = classifiers_of(config)
    if not classes:
        return BackboneForImageClassification if takes_head(config) else AutoModelForImageClassification  # it says so
    named = sorted(classes, key=lambda cls: cls.__name__ not in (config.architectures or ()))  # its own class first
    trainable = [cls for cls in named if "labels" in inspect.signature(cls.forward).parameters]
    if not trainable:
        raise UsageError(f"`{name}` is made for {named[0].__name__}, which takes no labels: it cannot be trained here.")
    return trainable[0]


def make_config(method: str, options: Mapping[str, Any]) -> Any:
    """The configuration of a method.

    Args:
        method: One of `METHODS`.
        options: Its fields.

    Raises:
        UsageError: If there is no such method or no such field.
    """
    if method not in METHODS:
        raise UsageError(f"`--method {method}` is unknown. Use one of {', '.join(METHODS)}.")
    config = METHODS[method].config
    known = [field.name for field in fields(config) if field.init]
    check_names(options, known, f"option of {method}")
    return config(**read_fields(options, config))


def check_names(given: Mapping[str, Any], known: Sequence[str], kind: str) -> None:
    """Refuse names that nobody reads.

    Raises:
        UsageError: Naming the first of them, and what is close.
    """
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3) or sorted(known)
            raise UsageError(f"`{name}` is no {kind}. Did you mean {', '.join(close)}?")


def changed(config: Any) -> dict[str, Any]:
    """What of a configuration is not as it comes."""
    plain = type(config)().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != plain.get(name)}


__all__ = [
    "changed",
    "check_names",
    "describe_head",
    "find_adapter",
    "from_config",
    "load_model",
    "make_config",
    "make_model",
    "model_of",
    "read_model_config",
]
