"""Names of `peft_bsr.data`; import them from there."""

from peft_bsr.data import LabelledImages, collate, load_images, load_processor, to_pictures, to_pixels, with_pixels
from peft_bsr.training.scores import compute_accuracy

__all__ = [
    "LabelledImages",
    "collate",
    "compute_accuracy",
    "load_images",
    "load_processor",
    "to_pictures",
    "to_pixels",
    "with_pixels",
]
