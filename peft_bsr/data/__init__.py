"""Images from wherever they lie, as a model's own processor wants them: what commands, examples and benchmarks share.

`load_images` reads, `put_aside` splits, `check_images` decodes everything once and says what is there, `load_processor`
and `with_pixels` make what the model sees. Nothing outside of this package decides these things.

Not imported by `peft_bsr` itself: it needs `datasets` and Pillow (`pip install 'peft-bsr[cli]'`), and scikit-learn for
its digits.
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
