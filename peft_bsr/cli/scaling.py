"""Scaling for regression: training uses scaled values, and the saved head returns unscaled ones."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from peft_bsr.cli.output import Output
from peft_bsr.data import LabelledImages, collate, labels_of, with_pixels
from peft_bsr.errors import UnsupportedModelError
from peft_bsr.problem_type import REGRESSION
from peft_bsr.training.target_scale import TargetScale, output_layer


def find_scale(
    model: PeftModel | PreTrainedModel, data: LabelledImages, processor: BaseImageProcessor, out: Output
) -> TargetScale | None:
    """Find the scale of the targets and print it; None if the labels are classes, or if no layer can absorb it.

    Args:
        model: Model to train.
        data: Images to train on.
        processor: Image processor.
        out: Output of the command.
    """
    if data.problem_type != REGRESSION:
        return None
    try:
        output_layer(model, _pixels(data, processor))
    except UnsupportedModelError as error:
        out.note(f"values are not scaled for training: {error}")
        return None
    scale = TargetScale.of(labels_of(data.train))
    out.note(scale.describe(data.labels))
    return scale


def fold(
    scale: TargetScale | None,
    model: PeftModel | PreTrainedModel,
    data: LabelledImages,
    processor: BaseImageProcessor,
) -> None:
    """Fold the scale into the trained model, so that it returns unscaled values.

    Args:
        scale: Scale from `find_scale`.
        model: Trained model.
        data: Images of the training.
        processor: Image processor.
    """
    if scale is not None:
        scale.fold_into(model, _pixels(data, processor))


def _pixels(data: LabelledImages, processor: BaseImageProcessor) -> Tensor:
    """Pixels of one training image."""
    return collate([with_pixels(data.train, processor)[0]])["pixel_values"]


__all__ = ["find_scale", "fold"]
