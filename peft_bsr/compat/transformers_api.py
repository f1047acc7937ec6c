"""Private interfaces of transformers that the package uses. Tested with transformers 5.18.0, 5.23.0 and 5.24.0."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING,
)
from transformers.pipelines import SUPPORTED_TASKS
from transformers.training_args import ParallelMode

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""`(module, query, key, value, mask, scaling=..., dropout=...) -> (output, weights or None)`, with query [B, H, N, d]
and output [B, N, H, d].
"""

_CAPTURING = "transformers.utils.output_capturing"

IMPLEMENTATION = "_attn_implementation"
"""Attribute of a config: name of the attention function, read at every call; None or `"eager"` = the model's own."""

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""Attribute of a block under gradient checkpointing: a partial of torch's `checkpoint`, called with its forward."""

attention_functions: Mapping[str, AttentionFunction] = ALL_ATTENTION_FUNCTIONS
"""Attention functions by the name of their implementation, including those registered later."""

EAGER_ATTENTION = "eager_attention_forward"
"""Name, in a modeling file, of the model's own attention function; see `AttentionFunction`."""

ROTATE = "apply_rotary_pos_emb"
"""Name of a function in a modeling file: `(query, key, cos, sin) -> (query, key)`."""


def function_of(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The function `name` in the file that defines the forward of `module`.

    A class may inherit its forward from another file, or call its base class's there.

    Args:
        module: An attention.
        name: `EAGER_ATTENTION` or `ROTATE`.

    Returns:
        The function, or None if no file of a class of `module` with a forward has it.
    """
    files = [sys.modules.get(cls.__module__) for cls in type(module).__mro__ if "forward" in vars(cls)]
    return next((getattr(file, name) for file in files if hasattr(file, name)), None)


def is_capture_hook(hook: object) -> bool:
    """Whether transformers uses this forward hook to capture hidden states or attention weights."""
    return getattr(hook, "__module__", None) == _CAPTURING


def captured_outputs() -> frozenset[str]:
    """Outputs that the running forward captures, such as `"attentions"`. Its hooks remain afterwards."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    names = (collector.get() or ()) if collector is not None else ()
    return frozenset(name for name in names if not name.startswith("_"))  # the others say which layers are captured


def source_of(config: PreTrainedConfig | None) -> str | None:
    """Folder or Hub id that a model was loaded from; None or empty if it was created in memory."""
    return getattr(config, "_name_or_path", None)


def forget_source(config: PreTrainedConfig) -> None:
    """Clear the folder or Hub id in a config, so that a model created from it does not claim those weights."""
    config._name_or_path = ""


def classifiers_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """Image classifier classes that `AutoModelForImageClassification` knows for a config; empty if none."""
    found = AutoModelForImageClassification._model_mapping.get(type(config), ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def model_classes_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """`classifiers_of`, and the bare models that `AutoModel` knows for the config."""
    mappings = (MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING)
    found = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    return tuple(one for kinds in found for one in (kinds if isinstance(kinds, tuple) else (kinds,)))


def config_class_of(model_type: str) -> type[PreTrainedConfig]:
    """The configuration class of a `model_type`.

    Raises:
        KeyError: If there is none.
    """
    return CONFIG_MAPPING[model_type]


def backbone_class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The bare model class of a config: `AutoModel`'s, else the vision model in the same modeling file, or None."""
    if type(config) in MODEL_MAPPING:
        found = MODEL_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    getattr(transformers, type(config).__name__.replace("Config", "Model"), None)  # this imports the modeling file
    file = sys.modules.get(type(config).__module__.replace(".configuration_", ".modeling_"))
    for cls in vars(file).values() if file is not None else ():
        is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__name__.endswith("VisionModel")
        if is_model and cls.config_class is type(config):
            return cls
    return None


def register_classifier(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Register an image classifier with the Auto classes and with pipelines."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForImageClassification.register(config_class, model_class, exist_ok=True)
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[config_class.model_type] = model_class.__name__


def keep_weights(model: nn.Module) -> None:
    """Mark the weights as initialized, so that a model that contains this one does not initialize them again."""
    for module in model.modules():
        vars(module)["_is_hf_initialized"] = True


def class_names_of_task(task: str) -> set[str]:
    """Names of the model classes that the Auto classes of a pipeline task know.

    Args:
        task: `"image-classification"`, ...
    """
    names: set[str] = set()
    for auto in SUPPORTED_TASKS[task]["pt"]:
        for known in auto._model_mapping._model_mapping.values():
            names |= {known} if isinstance(known, str) else set(known)
    return names


def image_processor_names(model_type: str) -> dict[str, str]:
    """Class names of a model type's image processors by backend (`"pil"`, ...); empty if there are none."""
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    return dict(names) if isinstance(names, dict) else {}


def read_image_processor(source: str, **place: Any) -> BaseImageProcessor:
    """A model's own image processor. One that needs torchvision (DINOv3's) runs with Pillow if torchvision is missing.

    Args:
        source: Folder or Hub id of the model.
        place: `revision`, `token` and `local_files_only`, as for `from_pretrained`.

    Raises:
        OSError, ValueError, ImportError: If there is none. They are transformers' own.
    """
    from transformers import ViTImageProcessorPil  # it needs Pillow, which is not a dependency of the package

    try:
        own: BaseImageProcessor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **place)
        return own
    except (OSError, ValueError, ImportError):
        with contextlib.suppress(OSError, ValueError):
            values, _ = ViTImageProcessorPil.get_image_processor_dict(source, **place)
            if "image_mean" in values:  # the file of a feature extractor of sound has the same name
                names = ("size", "do_normalize", "image_mean", "image_std", "rescale_factor")
                return ViTImageProcessorPil(**{name: values[name] for name in names if values.get(name) is not None})
        raise


def use_one_gpu(arguments: TrainingArguments) -> int:
    """Make Trainer train on the first GPU. By itself it wraps the model in `nn.DataParallel` if there are several.

    Args:
        arguments: Arguments of the Trainer, changed in place. Those of a distributed launch are left as they are.

    Returns:
        Number of other GPUs, which Trainer would have used.
    """
    if arguments.parallel_mode != ParallelMode.NOT_DISTRIBUTED:
        return 0
    others = arguments.n_gpu - 1
    arguments._n_gpu = 1
    return others


__all__ = [
    "CHECKPOINT_FUNCTION",
    "EAGER_ATTENTION",
    "IMPLEMENTATION",
    "ROTATE",
    "AttentionFunction",
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
    "read_image_processor",
    "register_classifier",
    "source_of",
    "use_one_gpu",
]
