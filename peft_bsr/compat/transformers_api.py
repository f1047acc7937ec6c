"""Private interfaces of transformers that the package uses. Tried: transformers 5.18.0, 5.23.0, 5.24.0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
)
from transformers.pipelines import SUPPORTED_TASKS

_CAPTURING = "transformers.utils.output_capturing"

IMPLEMENTATION = "_attn_implementation"
"""Attribute of a config: the name by which an attention looks its function up at each call; None or `"eager"` = own."""

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Attribute of a block under gradient checkpointing: a partial of torch's `checkpoint`, called with its forward."""

attention_functions: Mapping[str, Callable[..., Any]] = ALL_ATTENTION_FUNCTIONS
"""Attention functions by the name of their implementation, those too that were registered later."""

EAGER_ATTENTION = "eager_attention_forward"
"""Function in the file of a model: its own attention, `(module, query, key, value, mask, scaling) -> (output, weights)`
with query [B, H, N, d] and output [B, N, H, d].
"""

ROTATE = "apply_rotary_pos_emb"
"""Function in the file of a model: `(query, key, cos, sin) -> (query, key)`."""


def function_of(module: nn.Module, name: str) -> Any:
    """The function `name` that the forward of `module` finds next to itself in its file.

    A class may inherit its forward, or call that of its base class, from another file.

    Args:
        module: An attention.
        name: `EAGER_ATTENTION` or `ROTATE`.

    Returns:
        The function, or None if no class of `module` with a forward has one next to it.
    """
    files = [sys.modules.get(cls.__module__) for cls in type(module).__mro__ if "forward" in vars(cls)]
    return next((getattr(file, name) for file in files if hasattr(file, name)), None)


def is_capture_hook(hook: Any) -> bool:
    """Whether a forward hook is one of those by which transformers captures hidden states and attention weights."""
    return getattr(hook, "__module__", None) == _CAPTURING


def captured_outputs() -> frozenset[str]:
    """What the running forward captures (`"hidden_states"`, `"attentions"`); transformers' hooks outlast a request."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return frozenset((collector.get() or ()) if collector is not None else ())


def source_of(config: Any) -> str | None:
    """Folder or Hub id that a model was loaded from; None or empty where it was made in memory."""
    return getattr(config, "_name_or_path", None)


def forget_source(config: Any) -> None:
    """What is made of the config no longer claims to have the weights of the place that it was loaded from."""
    config._name_or_path = ""


def classifiers_of(config: Any) -> tuple[type[nn.Module], ...]:
    """Classes of image classifiers that `AutoModelForImageClassification` knows for a config, empty for none."""
    found = AutoModelForImageClassification._model_mapping.get(type(config), ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def model_classes_of(config: Any) -> tuple[type[nn.Module], ...]:
    """`classifiers_of`, and the bare models that `AutoModel` knows for the config."""
    mappings = (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING)
    found = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    return tuple(one for kinds in found for one in (kinds if isinstance(kinds, tuple) else (kinds,)))


def config_class_of(model_type: str) -> Any:
    """The class of configurations of that `model_type`.

    Raises:
        KeyError: If there is none.
    """
    return CONFIG_MAPPING[model_type]


def backbone_class_of(config: Any) -> Any:
    """The class of the bare model of a config: the one of `AutoModel`, the vision model next to it, or None."""
    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    file = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    for cls in vars(file).values() if file is not None else ():
        is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__name__.endswith("VisionModel")
        if is_model and cls.config_class is type(config):
            return cls
    return None


def register_classifier(config_class: Any, model_class: Any) -> None:
    """Make an image classifier known to the automatic classes and to pipelines."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForImageClassification.register(config_class, model_class, exist_ok=True)
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[config_class.model_type] = model_class.__name__


def keep_weights(model: nn.Module) -> None:
    """Have no model that this one becomes part of draw its weights again."""
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]


def class_names_of_task(task: str) -> set[str]:
    """Names of the models that the automatic classes of a pipeline's task know.

    Args:
        task: `"image-classification"`, ...
    """
    names: set[str] = set()
    for auto in SUPPORTED_TASKS[task]["pt"]:
        for known in auto._model_mapping._model_mapping.values():
            names |= {known} if isinstance(known, str) else set(known)
    return names


def image_processor_names(model_type: str) -> dict[str, str]:
    """Class names of the image processors of a model type by backend (`"pil"`, ...), empty for none."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    return dict(names) if isinstance(names, dict) else {}


__all__ = [
    "CHECKPOINT_FUNCTION",
    "EAGER_ATTENTION",
    "IMPLEMENTATION",
    "ROTATE",
    "attention_functions",
    "backbone_class_of",
    "captured_outputs",
    "class_names_of_task",
    "classifiers_of",
    "config_class_of",
    "forget_source",
    "function_of",
    "image_processor_names",
    "is_capture_hook",
    "keep_weights",
    "model_classes_of",
    "register_classifier",
    "source_of",
]
