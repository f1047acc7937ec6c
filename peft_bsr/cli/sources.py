"""MODEL on the command line: a model or an adapter, and how it is loaded."""

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
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from peft_bsr.backbones import BackboneForImageClassification, BackboneWithHeadConfig, set_image_size, takes_head
from peft_bsr.cli.values import read_fields
from peft_bsr.compat.transformers_api import classifiers_of
from peft_bsr.errors import UnsupportedModelError, UsageError
from peft_bsr.hub import read_config
from peft_bsr.hub.files import ADAPTER, MODEL, list_files
from peft_bsr.problem_type import SINGLE_LABEL, ProblemType
from peft_bsr.tuners import METHODS
from peft_bsr.tuners.base.config import SavedConfig


def find_adapter(name: str) -> PeftConfig | None:
    """The adapter's configuration, or None if MODEL is a model.

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


def read_model_config(name: str) -> PreTrainedConfig:
    """A model's configuration.

    Args:
        name: MODEL, a model.

    Raises:
        UsageError: If it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UsageError(f"`{name}` is neither a local folder nor a model on the Hub: {reason}") from error


def model_of(adapter: PeftConfig | None, name: str) -> str:
    """MODEL itself, or the base model if MODEL is an adapter."""
    return name if adapter is None else str(adapter.base_model_name_or_path)


def takes_sound(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of a model of sound, such as an AST, a Whisper or a wav2vec 2.0."""
    return getattr(_own_class(config), "main_input_name", None) in ("input_values", "input_features")


def refuse_sound(name: str) -> None:
    """Raise if a model is one of sound, before anything else is read.

    Args:
        name: MODEL, a model.

    Raises:
        UsageError: If it is, or if its configuration cannot be read.
    """
    if takes_sound(read_model_config(name)):
        raise UsageError(
            f"`{name}` is a model of sound, and this command reads images. Train it in Python with transformers' "
            "Trainer, as examples/sound.py does with a folder of WAV files (docs/bsr.md, Sound)."
        )


def make_model(
    name: str,
    labels: int | None = None,
    device: str = "cpu",
    image_size: int | tuple[int, int] | None = None,
    is_short: bool = False,
) -> PreTrainedModel:
    """A model with random weights; only its configuration is downloaded.

    Args:
        name: MODEL, a model.
        labels: Number of classes of its head. Default None: as in the configuration.
        device: Device of the weights, or `"meta"` for no weights. Default `"cpu"`.
        image_size: Pixels, see `peft_bsr.set_image_size`. Default None: as in the configuration.
        is_short: Whether a language model around the vision model has a single layer. Default False.
    """
    config = read_model_config(name)
    if is_short and (text := config.get_text_config()) is not config:
        text.num_hidden_layers = 1
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
    if labels is not None:
        config.num_labels = labels
    with torch.device(device):
        model = from_config(config)
    if image_size is not None:
        set_image_size(model, image_size)
    return model


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights; a classifier if its family has one."""
    if config.architectures is None:
        config.architectures = []  # transformers goes through them where a family has several classifiers, as DeiT
    own = _own_class(config)
    made: PreTrainedModel
    if takes_head(config):
        with suppress(UnsupportedModelError):  # the error of the model itself has more details
            return BackboneForImageClassification(BackboneWithHeadConfig(config, num_labels=config.num_labels))
    if classifiers_of(config):
        made = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    elif isinstance(own, type) and issubclass(own, transformers.PreTrainedModel):
        made = own(config)
    else:
        made = transformers.AutoModel.from_config(config, trust_remote_code=False)
    return made


def _own_class(config: PreTrainedConfig) -> object:
    """The class in transformers that a model was saved from, or None."""
    return getattr(transformers, (config.architectures or ["AutoModel"])[0], None)


def load_model(
    name: str,
    labels: Sequence[str],
    problem_type: ProblemType = SINGLE_LABEL,
    image_size: int | tuple[int, int] | None = None,
) -> PreTrainedModel:
    """A model with its weights and a head for `labels`.

    A distilled checkpoint, whose own class takes no labels, becomes the plain classifier of its family.

    Args:
        name: MODEL, a model.
        labels: Names of the classes, or of the values.
        problem_type: Type of the labels, as in transformers' configurations.
        image_size: Pixels, see `peft_bsr.set_image_size`. Default None: the size of the model.

    Raises:
        UsageError: If it cannot be loaded, or if no classifier of its family takes labels.
    """
    try:
        model = trainable_class(name, read_model_config(name)).from_pretrained(
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


def describe_head(name: str, model: PreTrainedModel) -> str | None:
    """One line about the new head of a model that had none, or None.

    Args:
        name: MODEL.
        model: Model from `load_model`.
    """
    if not isinstance(model, BackboneForImageClassification) or not takes_head(read_model_config(name)):
        return None
    return f"{name} has no head: {model.describe_head()}"


def trainable_class(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The image classifier of the model's family that can be trained: its forward takes labels.

    Args:
        name: MODEL, a model.
        config: Its configuration.

    Raises:
        UsageError: If there is none.
    """
    classes = classifiers_of(config)
    if not classes:
        return (
            BackboneForImageClassification if takes_head(config) else AutoModelForImageClassification
        )  # its error says so
    named = sorted(classes, key=lambda cls: cls.__name__ not in (config.architectures or ()))  # its own class first
    trainable = [cls for cls in named if "labels" in inspect.signature(cls.forward).parameters]
    if not trainable:
        own = named[0].__name__
        raise UsageError(f"`{name}` is a {own}, which takes no labels: `train` does not support it.")
    return trainable[0]


def make_config(method: str, options: Mapping[str, object]) -> SavedConfig:
    """The configuration of a method.

    Args:
        method: One of `METHODS`.
        options: Fields of the configuration.

    Raises:
        UsageError: If there is no such method or no such field.
    """
    if method not in METHODS:
        raise UsageError(f"`--method {method}` is unknown. Use one of {', '.join(METHODS)}.")
    config = METHODS[method].config
    known = [field.name for field in fields(config) if field.init]
    check_names(options, known, f"option of {method}")
    return config(**read_fields(options, config))


def check_names(given: Mapping[str, object], known: Sequence[str], kind: str) -> None:
    """Check that all names are known.

    Raises:
        UsageError: If a name is unknown; the message suggests similar names, or all if none is similar.
    """
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            hint = f"Did you mean {', '.join(close)}?" if close else f"Use one of {', '.join(sorted(known))}."
            raise UsageError(f"unknown {kind}: `{name}`. {hint}")


def changed(config: PeftConfig) -> dict[str, Any]:
    """Fields of a configuration that differ from the defaults."""
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
    "refuse_sound",
    "takes_sound",
    "trainable_class",
]
