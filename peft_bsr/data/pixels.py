"""From a file or a row to the model's input: rotated upright, RGB, resized and normalized by the processor."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from peft_bsr.errors import DatasetError, one_line

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

Transform = Callable[[PILImage.Image], PILImage.Image]
Columns = dict[str, list[Any]]  # rows as `datasets` passes them to a transform


class StoredImage(TypedDict):
    """An image as `datasets` stores it: a file, or its bytes."""

    path: str | None
    bytes: bytes | None


ImageSource = str | Path | bytes | StoredImage | PILImage.Image | None
_TOPS = {"I": (255, 65535), "F": (1, 255, 65535)}  # ends of the ranges in use, smallest first


def open_image(source: ImageSource) -> PILImage.Image:
    """A decoded image, rotated upright by its EXIF orientation, in the mode it was stored in.

    Args:
        source: Path, bytes, `{"path": ..., "bytes": ...}` as `datasets` stores it, or a Pillow image.

    Raises:
        DatasetError: If there is no image, or if it cannot be decoded. The message names the file.
    """
    name = image_name(source) or "an image"
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if source is None:
        raise DatasetError("a row has no image.")
    try:
        if not isinstance(source, PILImage.Image):
            source = PILImage.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        source.load()
        kept = source.format
        image: PILImage.Image = ImageOps.exif_transpose(source)
        image.format = kept
        return image
    except FileNotFoundError:
        raise DatasetError(f"there is no file `{name}`.") from None
    except (UnidentifiedImageError, IsADirectoryError):
        raise DatasetError(f"`{name}` is not an image.") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DatasetError(f"`{name}` cannot be decoded: {one_line(error)}") from error


def image_name(source: ImageSource) -> str | None:
    """File name of an image for messages, or None if it has none.

    Args:
        source: See `open_image`.
    """
    if isinstance(source, dict):
        source = source.get("path")
    if isinstance(source, PILImage.Image):
        source = getattr(source, "filename", None)
    return str(source) if source and isinstance(source, (str, Path)) else None


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Convert an image to 8-bit RGB, by the range of its mode.

    16-bit grey is divided by 257. 32-bit integers and floats are scaled from the smallest range in use that holds their
    values (0 to 1 for floats, 0 to 255, 0 to 65535), or else from the image's own smallest and largest value. Alpha is
    dropped, as in `transformers.pipeline`. Of several frames the first is used.

    Args:
        image: Image of any size and mode.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = PILImage.fromarray(_eight_bits(image))
    elif image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = cast(PILImage.Image, ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB"))  # None only in place
    elif image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode[:-1] + "A")
    return image.convert("RGB")


def to_pixels(images: Sequence[PILImage.Image], processor: BaseImageProcessor) -> Tensor:
    """Images as a tensor [B, 3, H, W] for the model.

    Args:
        images: Images of any size and mode.
        processor: From `load_processor`.
    """
    upright = [to_rgb(open_image(image)) for image in images]
    pixels: Tensor = processor(upright, return_tensors="pt")["pixel_values"]
    return pixels


def to_pictures(pixels: Tensor, processor: BaseImageProcessor) -> np.ndarray:
    """The model's input as pictures [B, H, W, 3] in 0 to 1, for drawing.

    Args:
        pixels: [B, 3, H, W], from `to_pixels`.
        processor: The processor that made them.
    """
    shown = pixels.permute(0, 2, 3, 1).cpu().float().numpy()
    pictures: np.ndarray = (shown * np.array(processor.image_std) + np.array(processor.image_mean)).clip(0, 1)
    return pictures


def with_pixels(images: Dataset, processor: BaseImageProcessor, transform: Transform | None = None) -> Dataset:
    """The images as `pixel_values` (and `labels`, if there are any), computed when a row is read.

    Args:
        images: Rows with the column `image`, and optionally `label`.
        processor: From `load_processor`.
        transform: Applied to each upright RGB image before the processor: augmentation, for training. Workers that are
            started by `spawn` or `forkserver` need one that can be pickled. Default None.
    """
    return stored(images).with_transform(_Preprocess(processor, transform))


@dataclass(frozen=True)
class _Preprocess:
    """From rows with images as they are stored to pixels and labels. It can be pickled for workers of a loader."""

    processor: BaseImageProcessor
    transform: Transform | None

    def __call__(self, rows: Columns) -> Columns:
        opened = [to_rgb(open_image(image)) for image in rows["image"]]
        if self.transform is not None:
            opened = [self.transform(image) for image in opened]
        made: Columns = {"pixel_values": list(to_pixels(opened, self.processor))}
        return made | ({"labels": rows["label"]} if "label" in rows else {})


def stored(images: Dataset) -> Dataset:
    """The rows with images as they are stored, `{"path": ..., "bytes": ...}`, without decoding.

    Args:
        images: Rows with the column `image`.
    """
    return images.cast_column("image", Image(decode=False))


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: `pixel_values` [B, 3, H, W] and, if there are any, `labels` [B] ([B, C] for vectors of C numbers)."""
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        batch["labels"] = torch.stack([torch.as_tensor(example["labels"]) for example in examples])
    return batch


def _eight_bits(image: PILImage.Image) -> np.ndarray:
    """[H, W] of whole numbers from 0 to 255."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow 10 reads 16 bits as I
        low, high = 0.0, 65535.0
    elif low >= 0:
        top = next((top for top in _TOPS[image.mode] if high <= top), None)
        low, high = (low, high) if top is None else (0.0, float(top))
    scaled: np.ndarray = ((values - low) * (255 / ((high - low) or 1))).round().astype(np.uint8)
    return scaled


__all__ = [
    "Columns",
    "ImageSource",
    "StoredImage",
    "Transform",
    "collate",
    "image_name",
    "open_image",
    "stored",
    "to_pictures",
    "to_pixels",
    "to_rgb",
    "with_pixels",
]
