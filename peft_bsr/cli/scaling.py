"""A regression trains on scaled values, and its saved head gives them as they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peft_bsr.cli.output import Output
from peft_bsr.data import LabelledImages, collate, labels_of, with_pixels
from peft_bsr.errors import UnsupportedModelError
from peft_bsr.problem_type import REGRESSION
from peft_bsr.training.target_scale import TargetScale, output_layer


def find_scale(model: Any, data: LabelledImages, processor: Any, out: Output) -> TargetScale | None:
    """The scale to train on, said; None where the labels are no values, or where no layer can take it over.

    Args:
        model: As it is trained.
        data: Its images.
        processor: Of the images.
        out: The screen.
    """
    if data.problem_type != REGRESSION:
        return None
    try:
        output_layer(model, _pixels(data, processor))
    except UnsupportedModelError as error:
        out.note(f"trained on values as they are: {error}")
        return None
    scale = TargetScale.of(labels_of(data.train))
    out.note(scale.describe(data.labels))
    return scale


def fold(scale: TargetScale | None, model: Any, data: LabelledImages, processor: Any) -> None:
    """Let the trained model give values as they are.

    Args:
        scale: From `find_scale`.
        model: The trained one.
        data: Its images.
        processor: Of the images.
    """
    if scale is not None:
        scale.fold_into(model, _pixels(data, processor))


def _pixels(data: LabelledImages, processor: Any) -> Tensor:
    """One training image as the model sees it."""
    return collate([with_pixels(data.train, processor)[0]])["pixel_values"]


__all__ = ["find_scale", "fold"]
