"""Metadata of an ONNX file: names of the classes, and the preprocessing of images."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peft_bsr.compat.transformers_api import read_image_processor
from peft_bsr.errors import ExportError, headline
from peft_bsr.problem_type import REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

_PROCESSOR = "preprocessor_config"  # transformers' own file of that name


def describe_model(
    model: PreTrainedModel,
    shape: Sequence[int],
    processor: BaseImageProcessor | None = None,
    *,
    is_classifier: bool = True,
) -> dict[str, str]:
    """Metadata of the file: name -> string, with other values as JSON.

    Args:
        model: The base model.
        shape: Shape of an image, (channels, height, width).
        processor: From `fit_processor`. Default None: unknown.
        is_classifier: Whether its outputs are the classes or values that its configuration names; models without a head
            have none, heads of `tasks` have others. Default True.

    Returns:
        `labels` and `problem_type` for a model with classes; `image_size` [height, width]; and with a processor
        `image_mean`, `image_std`, `rescale_factor`, `resample` (`"bicubic"`, ...) and `preprocessor_config`,
        transformers' own file.
    """
    found: dict[str, object] = {}
    named = getattr(model.config, "id2label", None)
    if is_classifier and named and getattr(model.config, "num_labels", None) == len(named):
        found["labels"] = [str(named[index]) for index in sorted(named)]
        found["problem_type"] = problem_type_of(model.config)
    if len(shape) == 3:
        found["image_size"] = list(shape[1:])
    if processor is not None:
        found |= _describe_processor(processor)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}


def problem_type_of(config: PreTrainedConfig) -> ProblemType:
    """The problem type of a model.

    Args:
        config: Configuration of a model. Without a `problem_type`, one output is a regression, as in transformers.
    """
    named: ProblemType | None = getattr(config, "problem_type", None)
    return named or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)


def processor_of(description: Mapping[str, str]) -> BaseImageProcessor | None:
    """The image processor that a file describes, or None.

    Args:
        description: From `describe_model`.

    Raises:
        ExportError: If transformers cannot make it.
    """
    if _PROCESSOR not in description:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(description[_PROCESSOR], encoding="utf-8")
        try:
            return read_image_processor(folder)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise ExportError(f"The file's `{_PROCESSOR}` cannot be read ({headline(error)}).") from error


def add_description(path: Path, description: Mapping[str, str]) -> None:
    """Write metadata into an ONNX file without touching its weights.

    Args:
        path: The file.
        description: From `describe_model`.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(model, dict(description))
    onnx.save(model, path)


def _describe_processor(processor: BaseImageProcessor) -> dict[str, object]:
    from PIL.Image import Resampling  # Pillow is not a dependency of the package

    scale = processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0
    normalizes = getattr(processor, "do_normalize", True)
    return {
        "image_mean": list(processor.image_mean) if normalizes else [0.0] * 3,
        "image_std": list(processor.image_std) if normalizes else [1.0] * 3,
        "rescale_factor": scale,
        "resample": Resampling(int(processor.resample)).name.lower(),
        _PROCESSOR: processor.to_json_string(),
    }


__all__ = ["add_description", "describe_model", "problem_type_of", "processor_of"]
