"""Reading image datasets and preprocessing them for a model. Commands, examples and benchmarks all use it.

`load_images` reads a dataset, `put_aside` splits it, `check_images` decodes every image once and reports what it found,
`load_processor` and `with_pixels` make the model's inputs.

`peft_bsr` does not import this package: it needs `datasets` and Pillow (`pip install 'peft-bsr[cli]'`), and
scikit-learn for the digits.
"""

from peft_bsr.data.check import BadImage, DataReport, check_images, refuse_bad
from peft_bsr.data.images import LabelledImages, labels_of, load_images, load_unlabelled
from peft_bsr.data.pixels import (
    Transform,
    collate,
    image_name,
    open_image,
    stored,
    to_pictures,
    to_pixels,
    to_rgb,
    with_pixels,
)
from peft_bsr.data.processor import load_processor, size_of
from peft_bsr.data.rows import DIGITS, SPLITS
from peft_bsr.data.splits import choose, draw_for_trial, put_aside

__all__ = [
    "DIGITS",
    "SPLITS",
    "BadImage",
    "DataReport",
    "LabelledImages",
    "Transform",
    "check_images",
    "choose",
    "collate",
    "draw_for_trial",
    "image_name",
    "labels_of",
    "load_images",
    "load_processor",
    "load_unlabelled",
    "open_image",
    "put_aside",
    "refuse_bad",
    "size_of",
    "stored",
    "to_pictures",
    "to_pixels",
    "to_rgb",
    "with_pixels",
]
