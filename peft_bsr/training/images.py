"""Labelled images from wherever they lie, as a model's own processor wants them: what command line and examples share.

Not imported by `peft_bsr` itself: `datasets` is needed here alone (`pip install 'peft-bsr[cli]'`), and scikit-learn for
its digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor

from peft_bsr.errors import DatasetError, headline

DIGITS = "digits"
_BICUBIC = int(PILImage.Resampling.BICUBIC)


@dataclass(frozen=True)
class LabelledImages:
    """Training and test images of one set.

    Attributes:
        train: With the columns `image` and `label`, whatever they were called.
        test: The same.
        labels: Names of the classes, by number.
    """

    train: Dataset
    test: Dataset
    labels: list[str]


def load_images(name: str = DIGITS) -> LabelledImages:
    """Images and labels of a data set.

    Args:
        name: `"digits"` (scikit-learn's, without network), a folder of images by class, a `.parquet` file, or the id of
            a data set on the Hub. Where there is no split `test` or `validation`, a fifth of the images is put aside,
            by class, always the same.

    Raises:
        DatasetError: If there is none of that name, or if it has no images or no class labels.
    """
    data = _digits() if name == DIGITS else _load(name)
    found = {
        kind: next((c for c, f in _features(data).items() if isinstance(f, kind)), None) for kind in (Image, ClassLabel)
    }
    if None in found.values():
        raise DatasetError(
            f"{name}: found the columns {list(_features(data))}, need one of images and one of class labels."
        )
    data = data.select_columns(list(found.values()))
    renamed = zip(found.values(), ("image", "label"), strict=True)
    data = data.rename_columns({old: new for old, new in renamed if old != new})
    if isinstance(data, DatasetDict):
        test = next((split for split in ("test", "validation") if split in data), None)
        data = DatasetDict(train=data["train"], test=data[test]) if test else data["train"]
    if isinstance(data, Dataset):
        data = data.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
    return LabelledImages(data["train"], data["test"], list(data["train"].features["label"].names))


def load_processor(source: str, image_size: int | None = None) -> Any:
    """A model's image processor, set to squeeze whole images into a square, so that no part of them is cut off.

    Args:
        source: Folder or Hub id of the model.
        image_size: Pixels of a side. Default None: the size the model was pretrained at.

    Returns:
        A processor of transformers. Saved beside an adapter, it makes a pipeline see what training saw.
    """
    size = image_size or image_size_of(source)
    processor = AutoImageProcessor.from_pretrained(source)
    for name in ("do_resize", "do_rescale", "do_normalize"):
        setattr(processor, name, True)
    processor.do_center_crop = False
    processor.size, processor.resample = {"height": size, "width": size}, _BICUBIC
    return processor


def image_size_of(source: str) -> int:
    """The size in pixels that the model was pretrained at.

    Args:
        source: Folder or Hub id of the model.
    """
    config = AutoConfig.from_pretrained(source)
    size: int = getattr(config, "vision_config", config).image_size
    return size


def to_pixels(images: list[PILImage.Image], processor: Any) -> Tensor:
    """[B, 3, H, W], as the model takes them.

    Args:
        images: Of any size and mode.
        processor: From `load_processor`.
    """
    pixels: Tensor = processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    return pixels


def to_pictures(pixels: Tensor, processor: Any) -> np.ndarray:
    """[B, H, W, 3] in 0 to 1: what the model was shown, for drawing.

    Args:
        pixels: [B, 3, H, W], from `to_pixels`.
        processor: The same.
    """
    shown = pixels.permute(0, 2, 3, 1).cpu().float().numpy()
    pictures: np.ndarray = (shown * np.array(processor.image_std) + np.array(processor.image_mean)).clip(0, 1)
    return pictures


def with_pixels(images: Dataset, processor: Any) -> Dataset:
    """The same images as `pixel_values` and `labels`, made when they are asked for.

    Args:
        images: With the columns `image` and `label`.
        processor: From `load_processor`.
    """

    def preprocess(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {"pixel_values": list(to_pixels(rows["image"], processor)), "labels": rows["label"]}

    return images.with_transform(preprocess)


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: `pixel_values` [B, 3, H, W] and `labels` [B]."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers, for Trainer's `compute_metrics`."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PILImage.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(d) for d in digits.target_names])})
    return Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def _load(name: str) -> Any:
    try:
        if Path(name).is_dir():
            return load_dataset("imagefolder", data_dir=name)
        if name.endswith(".parquet"):
            return load_dataset("parquet", data_files=name, split="train")
        return load_dataset(name)
    except Exception as error:  # datasets', the Hub's and the HTTP library's own errors
        raise DatasetError(
            f'`{name}` cannot be read ({headline(error)}). Give "{DIGITS}", '
            "a folder of images by class, a .parquet file or the id of a data set on the Hub."
        ) from error


def _features(data: Any) -> Any:
    return (data if isinstance(data, Dataset) else data["train"]).features


__all__ = [
    "DIGITS",
    "LabelledImages",
    "collate",
    "compute_accuracy",
    "image_size_of",
    "load_images",
    "load_processor",
    "to_pictures",
    "to_pixels",
    "with_pixels",
]
