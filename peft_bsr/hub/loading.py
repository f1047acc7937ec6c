"""Base model and adapter in one call, from a folder or from the Hub."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from peft_bsr.backbones import BackboneForImageClassification, inner_config, native_size, set_image_size
from peft_bsr.compat.peft_api import config_class, peft_type_of
from peft_bsr.errors import AdapterFileError, HubError, PeftBsrError, headline
from peft_bsr.hub.files import ADAPTER, MODEL, folder_read, list_files, place_of
from peft_bsr.tuners.base.base_model import with_settings

_SPARE = 0.01  # share of the weights that may be missing in a base model's file


@torch.inference_mode(False)  # weights that are made there can never train
def load(
    name: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    is_trainable: bool = False,
) -> PeftModel:
    """Load an adapter and its base model.

    The base model has the class that the adapter was trained on, a classifier for the adapter's labels, and the
    settings that differ from its own file (`problem_type`, input channels, image size: see `peft_bsr.set_image_size`);
    new weights come from the adapter.

    Args:
        name: Hub id or folder of the adapter.
        base: Hub id or folder of the base model. Default None: the one that the adapter names.
        revision: Revision of the adapter on the Hub. Default None: its main branch.
        token: Token for private repositories. Default None: the one of `hf auth login`.
        dtype: Dtype of the base model. Default None: the one it was saved in.
        image_size: Side length in pixels, or (height, width). Default None: the size in training.
        is_trainable: Whether to load it for further training. Default False: evaluation mode, without gradients.

    Returns:
        The model. `peft_bsr.pipeline` makes a pipeline in one call.

    Raises:
        HubError: If there is no adapter or base model, or if they do not fit together.

    Examples:
        >>> model = load("me/pets-bsr")  # doctest: +SKIP
        >>> model.config.id2label[0]  # doctest: +SKIP
        'Abyssinian'
    """
    config = read_config(name, revision=revision, token=token)
    model = load_base(config, base=base, token=token, dtype=dtype, image_size=image_size)
    try:
        loaded = PeftModel.from_pretrained(
            model, place_of(name), is_trainable=is_trainable, revision=revision, token=token
        )
    except RuntimeError as error:  # torch's, one line a weight
        raise HubError(
            f"The adapter `{name}` does not fit {type(model).__name__} of `{base or config.base_model_name_or_path}`: "
            f"{' '.join(str(error).split())[:300]}. Give the base model it was trained on as `base=`."
        ) from error
    loaded.peft_config[loaded.active_adapter].place = folder_read(name, revision=revision, token=token)
    return loaded if is_trainable else loaded.eval()


def read_config(name: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> PeftConfig:
    """An adapter's configuration.

    Args:
        name: See `load`.
        revision: See `load`.
        token: See `load`.

    Raises:
        HubError: If there is no adapter.
    """
    files = list_files(name, revision=revision, token=token)
    if ADAPTER not in files:
        raise HubError(
            f"`{name}` is not an adapter (it has no {ADAPTER}). Give a folder with adapter_config.json, or the id of a "
            "repository on the Hub that has one."
        )
    at = place_of(name)
    place: dict[str, Any] = {"revision": revision, "token": token}
    try:
        config: PeftConfig = config_class(peft_type_of(at, **place)).from_pretrained(at, **place)
        if not hasattr(config, "labels") and MODEL in files:  # of PEFT's own methods
            base = AutoConfig.from_pretrained(at, trust_remote_code=False, **place)
            config.labels = [base.id2label[index] for index in sorted(base.id2label)]
            config.image_size = native_size(base)
    except Exception as error:  # ours, PEFT's, or the Hub's and the HTTP library's own errors
        why = str(error) if isinstance(error, PeftBsrError) else headline(error)
        raise HubError(f"The adapter `{name}` cannot be read: {why}") from error
    config.fills_weights = False  # who reads the configuration alone
    return config


def load_base(
    config: PeftConfig,
    *,
    base: str | Path | None = None,
    token: str | bool | None = None,
    dtype: torch.dtype | str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> transformers.PreTrainedModel:
    """The base model of an adapter, with a classifier with random weights for the adapter's labels.

    Args:
        config: From `read_config`.
        base: See `load`.
        token: See `load`.
        dtype: See `load`.
        image_size: See `load`.

    Raises:
        HubError: If it cannot be read.
        ConfigError: If `image_size` does not fit the model.
        UnsupportedModelError: If the model cannot take images of `image_size`.
    """
    source = str(base or config.base_model_name_or_path or "")
    if not source:
        raise HubError("The adapter does not name its base model. Pass `base=`, a Hub id or a folder.")
    model_class = _class_of(config)
    settings_class = getattr(model_class, "config_class", None) or AutoConfig
    place: dict[str, Any] = {"token": token, "revision": None if base else config.revision, "trust_remote_code": False}
    labels, changes = getattr(config, "labels", None), getattr(config, "base_config", None)
    named: dict[str, object] = {}
    if labels:
        named["id2label"] = dict(enumerate(labels))
        named["label2id"] = {label: index for index, label in enumerate(labels)}
    try:
        list_files(source, token=token, revision=place["revision"])  # within seconds, also without a network
        with _quiet():  # the warning about new classifier weights is expected
            own = settings_class.from_pretrained(place_of(source), **place, **named)
            settings = with_settings(own, changes or {})
            size = image_size or getattr(config, "image_size", None) or native_size(settings)
            if native_size(own) is not None:  # position embeddings are loaded at their own size, then resized
                inner_config(settings).image_size = inner_config(own).image_size
            model, report = model_class.from_pretrained(
                place_of(source),
                config=settings,
                ignore_mismatched_sizes=bool(labels or changes),
                output_loading_info=True,
                **place,
                **({} if dtype is None else {"dtype": dtype}),
            )
    except AdapterFileError:
        raise
    except Exception as error:  # transformers', torch's and the Hub's own, of any class if settings are odd
        raise HubError(
            f"The base model `{source}` cannot be read ({headline(error)}). Pass another copy of it as `base=`, a "
            "Hub id or a folder."
        ) from error
    _check_complete(model, report, config, source)
    if size is not None:
        set_image_size(model, size)
    return model


def _class_of(config: PeftConfig) -> type[transformers.PreTrainedModel] | type[AutoModelForImageClassification]:
    """The class that the adapter was attached to, if it is one of transformers.

    Raises:
        HubError: If the adapter names a class that is not a model.
    """
    mapping = config.auto_mapping if isinstance(config.auto_mapping, dict) else {}
    library, name = (str(mapping.get(key, "")) for key in ("parent_library", "base_model_class"))
    if library == BackboneForImageClassification.__module__ and name == BackboneForImageClassification.__name__:
        return BackboneForImageClassification
    if library.split(".")[0] != "transformers":  # nothing else is imported because a file says so
        return AutoModelForImageClassification
    try:
        found = getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError, TypeError, ValueError):  # it has moved since
        found = getattr(transformers, name, AutoModelForImageClassification)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model and found is not AutoModelForImageClassification:
        raise HubError(f"The adapter names `{library}.{name}` as the class of its base model; it is not a model.")
    return found


def _check_complete(model: nn.Module, report: Mapping[str, Collection], config: PeftConfig, source: str) -> None:
    """Refuse another model's file: transformers initializes missing weights at random and only logs it.

    The head may be missing, because the adapter has it; so may a few weights that are only used in pretraining.
    """
    heads = {name for place, name in (getattr(config, "layout", None) or {}).items() if place.startswith("head.")}
    classes = len(getattr(config, "labels", None) or ())
    heads |= {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes}
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}

    def is_brought(name: str) -> bool:
        module = name.rpartition(".")[0]
        return module in heads or any(f".{part}." in f".{module}." for part in saved)

    lost = [name for name in report["missing_keys"] if name in sizes and not is_brought(name)]
    inside = _backbone_of(model, config)
    other = sorted(k[0] for k in report["mismatched_keys"] if k[0].startswith(inside) and not is_brought(k[0]))
    if sum(sizes[name] for name in lost) > _SPARE * sum(sizes.values()):
        raise HubError(
            f"`{source}` lacks {len(lost)} of the {len(sizes)} weights of {type(model).__name__}, such as "
            f"{sorted(lost)[0]}: it is another model. Pass the one the adapter was trained on as `base=`."
        )
    if other:
        raise HubError(
            f"`{source}` has other shapes for {len(other)} of the weights of {type(model).__name__}, such as "
            f"{other[0]}, and the adapter does not have them. Pass the model it was trained on as `base=`."
        )


def _backbone_of(model: nn.Module, config: PeftConfig) -> str:
    """Prefix of the names in the part with the blocks; the rest is the head, or is not used."""
    places = (getattr(config, "layout", None) or {}).items()
    top = next((name.partition(".")[0] for place, name in places if place.startswith("blocks.")), "")
    return f"{top}." if isinstance(getattr(model, top or "config", None), transformers.PreTrainedModel) else ""


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


__all__ = ["load", "load_base", "read_config"]
