"""Images and labels of a task, cut into training, validation and test the same way for every method."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor

HERE = Path(__file__).parent
HUB = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}  # others are Hub ids themselves


@dataclass(frozen=True)
class Protocol:
    """How many images are seen how often; see `protocols/*.json`."""

    name: str
    tasks: list[str]
    train_images: int
    validation_images: int
    test_images: int
    epochs: int
    batch_size: int
    main_seeds: int
    other_seeds: int
    sweep_train_images: int

    @classmethod
    def load(cls, name: str) -> Protocol:
        """From `protocols/NAME.json`, or from a file whose path ends on `.json`."""
        path = Path(name) if name.endswith(".json") else HERE / "protocols" / f"{name}.json"
        return cls(name=path.stem, **json.loads(path.read_text()))


def load_task(task: str, protocol: Protocol, data: Path | None) -> DatasetDict:
    """`train`, `validation` and `test` with the columns `image` and `label`, drawn by class and always the same.

    Args:
        task: Name of files `TASK-train-*.parquet` and `TASK-test-*.parquet` in `data`, or of a dataset of the Hub;
            `"digits"` is scikit-learn's.
        protocol: How many images of each; fewer where there are fewer.
        data: Folder, or None for the Hub.
    """
    if task == "digits":
        whole = _digits(protocol.test_images)
    elif data is not None:
        files = {split: [str(p) for p in sorted(data.glob(f"{task}-{split}-*.parquet"))] for split in ("train", "test")}
        if not all(files.values()):
            raise SystemExit(f"{data} has no {task}-train-*.parquet or no {task}-test-*.parquet.")
        whole = load_dataset("parquet", data_files=files)
    else:
        whole = load_dataset(HUB.get(task, task))
    train, test = (_named(whole[split]) for split in ("train", "test"))
    parts = _split(train, protocol.train_images, protocol.validation_images)
    return DatasetDict({"train": parts[0], "validation": parts[1], "test": _split(test, protocol.test_images, 0)[0]})


def with_pixels(images: Dataset, source: str) -> Dataset:
    """The same with `pixel_values` and `labels`, made by the model's own processor when they are asked for."""
    processor = AutoImageProcessor.from_pretrained(source)

    def preprocess(rows: dict[str, list[Any]]) -> dict[str, Any]:
        pixels = processor([np.asarray(image.convert("RGB")) for image in rows["image"]], return_tensors="pt")
        return {"pixel_values": list(pixels["pixel_values"]), "labels": rows["label"]}

    return images.with_transform(preprocess)


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def _digits(test_images: int) -> DatasetDict:
    """The 1797 images of 8 x 8 pixels, which have no split of their own."""
    digits = load_digits()
    images = [PILImage.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    data = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return data.train_test_split(test_size=test_images, seed=0, stratify_by_column="label")


def _named(images: Dataset) -> Dataset:
    """With the columns `image` and `label`, whatever they were called."""
    found = {
        kind: next((c for c, f in images.features.items() if isinstance(f, kind)), None) for kind in (Image, ClassLabel)
    }
    if None in found.values():
        raise SystemExit(f"the columns are {list(images.features)}; one of images and one of class labels are needed.")
    images = images.select_columns([found[Image], found[ClassLabel]])
    return images.rename_columns(
        {old: new for old, new in ((found[Image], "image"), (found[ClassLabel], "label")) if old != new}
    )


def _split(images: Dataset, first: int, second: int) -> tuple[Dataset, Dataset]:
    """Two parts that share nothing, each with its share of every class; sizes shrink alike where images are few."""
    shrink = min(1.0, len(images) / (first + second))
    order = images.shuffle(seed=0)
    labels = np.array(order["label"])
    places = np.empty(len(labels), dtype=np.int64)  # of an image among those of its class
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        places[members] = np.arange(len(members))
    by_place = np.lexsort((labels, places))  # one of every class, then the next of every class, ...
    cut, end = int(first * shrink), int((first + second) * shrink)
    return order.select(by_place[:cut]), order.select(by_place[cut:end])
