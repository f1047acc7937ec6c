"""A model's image processor: image size and normalization."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import transformers
from PIL import Image
from transformers import AutoConfig, ViTImageProcessorPil

from peft_bsr.backbones import inner_config, native_size
from peft_bsr.compat.transformers_api import image_processor_names, model_classes_of, read_image_processor
from peft_bsr.errors import DatasetError, ProcessorWarning, headline

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig

_BICUBIC = int(Image.Resampling.BICUBIC)


def load_processor(
    source: str,
    image_size: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> BaseImageProcessor:
    """A model's image processor, set to resize whole images to one size, without a crop.

    Args:
        source: Folder or Hub id of the model. If it has no processor, the default one of its model type is used, with a
            `ProcessorWarning` that gives mean and std.
        image_size: Side length in pixels. Default None: the size of the model's own processor (DINOv2: 224); for a
            model whose position embeddings have one size (ViT, CLIP), that size.
        mean: Mean of each channel, for images in 0 to 1. Default None: the processor's.
        std: Standard deviation of each channel. Default None: the processor's.

    Returns:
        A transformers image processor. Saved with an adapter, it gives a pipeline the preprocessing of training.

    Raises:
        DatasetError: If neither the model nor its model type has a processor, and `mean` and `std` are not given.
    """
    processor, is_own = _find(source, is_told=mean is not None and std is not None)
    if is_own and getattr(processor, "do_normalize", True) is False:  # the model does so by itself (RADIO)
        processor.image_mean, processor.image_std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    for name in ("do_resize", "do_rescale", "do_normalize"):
        setattr(processor, name, True)
    height, width = (image_size, image_size) if image_size else _size(processor, source, is_own)
    processor.do_center_crop = False
    processor.size, processor.resample = {"height": height, "width": width}, _BICUBIC
    for name, values in (("image_mean", mean), ("image_std", std)):
        if values is not None:
            if len(values) != 3:
                raise DatasetError(
                    f"`--{name.removeprefix('image_')}` needs 3 numbers, one per channel, not {len(values)}."
                )
            setattr(processor, name, [float(value) for value in values])
    if not is_own and (mean is None or std is None):
        warnings.warn(
            f"`{source}` has no image processor. The default of its model type is used, {type(processor).__name__}: "
            f"mean {_numbers(processor.image_mean)}, std {_numbers(processor.image_std)}. If the model was "
            "trained with others, set them with `--mean` and `--std`.",
            ProcessorWarning,
            stacklevel=2,
        )
    return processor


def size_of(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of a processor's output.

    Args:
        processor: From `load_processor`, or any transformers image processor.

    Raises:
        DatasetError: If the processor does not define them.
    """
    size = _size_made(processor)
    if size is None:
        raise DatasetError(f"{type(processor).__name__} does not define an image size. Give `--image-size`.")
    return size


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _find(source: str, is_told: bool) -> tuple[BaseImageProcessor, bool]:
    """The processor, and whether it is the model's own. `is_told`: mean and std are given, so any processor will do."""
    try:
        return read_image_processor(source), True
    except (OSError, ValueError, ImportError) as error:
        reason = headline(error)
    try:
        kind = inner_config(AutoConfig.from_pretrained(source, trust_remote_code=False)).model_type
    except (OSError, ValueError) as error:
        raise DatasetError(f"`{source}` has no image processor and no configuration ({headline(error)}).") from error
    names = image_processor_names(kind) or image_processor_names(kind.removesuffix("_vision_model"))
    made = getattr(transformers, names["pil"], None) if names.get("pil") else None
    if made is None and not is_told:
        raise DatasetError(
            f"`{source}` has no image processor, and transformers has none for models of type `{kind}` that runs "
            "without torchvision. Give `--mean` and `--std`, or put a preprocessor_config.json next to its weights. "
            f"What was found: {reason}"
        )
    return (made or ViTImageProcessorPil)(), False


def _size(processor: BaseImageProcessor, source: str, is_own: bool) -> tuple[int, int]:
    """The size of the model's own processor, if the model accepts it; otherwise the size of pretraining."""
    size, is_fixed = _pretrained(source)
    takes_made = is_own and not is_fixed and _size_made(processor) is not None
    return size_of(processor) if size is None or takes_made else size


def _pretrained(source: str) -> tuple[tuple[int, int] | None, bool]:
    """Image size of pretraining, if the configuration has it, and whether the model accepts only that size."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):  # a processor without a model; loading reports a missing model
        return None, False
    size = native_size(config)
    return size, size is not None and _is_fixed(config)


def _is_fixed(config: PreTrainedConfig) -> bool:
    """Whether the model accepts one image size, unless it interpolates its position embeddings."""
    parts = (config, inner_config(config))
    classes = [cls for part in parts for cls in model_classes_of(part)]
    return any("interpolate_pos_encoding" in inspect.signature(cls.forward).parameters for cls in classes)


def _size_made(processor: BaseImageProcessor) -> tuple[int, int] | None:
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = dict(crop or getattr(processor, "size", None) or {})
    height = size.get("height") or size.get("shortest_edge")
    width = size.get("width") or size.get("shortest_edge")
    return (int(height), int(width)) if height and width else None


__all__ = ["load_processor", "size_of"]
