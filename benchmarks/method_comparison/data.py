"""Images and labels of a task, split into training, validation and test in the same way for every method."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoImageProcessor

import peft_bsr.data
from peft_bsr.data.columns import as_images, image_column
from peft_bsr.data.labels import encode
from peft_bsr.data.targets import find_target
from peft_bsr.problem_type import SINGLE_LABEL

HERE = Path(__file__).parent
HUB = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}  # other tasks are Hub ids


@dataclass(frozen=True)
class Protocol:
    """Numbers of images and epochs of a comparison; see `protocols/*.json`.

    `extra_tasks` run only when they are named; results of them are reported. `timed_train_images` replaces
    `train_images` in training by the clock (`run.py --seconds`). `experiments` are those that run if none are named
    (empty: all). Recipes without a sweep of their own have the learning rate of the protocol `rates_of`. With
    `decoded`, images are decoded once and kept on the device, see pixels.py. `precision`: `"fp32"`, or `"bf16"`
    by autocast.
    """

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
    extra_tasks: tuple[str, ...] = ()
    timed_train_images: int | None = None
    experiments: tuple[str, ...] = ()
    rates_of: str | None = None
    decoded: bool = False
    precision: str = "fp32"

    @property
    def reported_tasks(self) -> tuple[str, ...]:
        """All tasks."""
        return (*self.tasks, *self.extra_tasks)

    def timed(self) -> Protocol:
        """The protocol of training by the clock."""
        return replace(self, train_images=self.timed_train_images or self.train_images)

    @classmethod
    def load(cls, name: str) -> Protocol:
        """Load `protocols/NAME.json`, or any file with a path that ends in `.json`."""
        path = Path(name) if name.endswith(".json") else HERE / "protocols" / f"{name}.json"
        return cls(name=path.stem, **json.loads(path.read_text()))


def load_task(task: str, protocol: Protocol, data: Path | None) -> DatasetDict:
    """Load `train`, `validation` and `test` with the columns `image` and `label`, always the same images, by class.

    Args:
        task: Name of files `TASK-train-*.parquet` and `TASK-test-*.parquet` in `data`, or of a dataset on the Hub;
            `"digits"` is scikit-learn's.
        protocol: Maximum number of images of each split.
        data: Folder, or None for the Hub.
    """
    if task == "digits":
        digits = peft_bsr.data.load_images().train  # 1797 images of 8 x 8 pixels, without a split of their own
        whole = digits.train_test_split(test_size=protocol.test_images, seed=0, stratify_by_column="label")
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
    """Add `pixel_values` and `labels`, computed on access by the model's own processor."""
    return peft_bsr.data.with_pixels(images, AutoImageProcessor.from_pretrained(source))


def _named(images: Dataset) -> Dataset:
    """Rename the columns to `image` and `label`."""
    image, _ = image_column(images)
    (label,) = find_target(images, image, problem_type=SINGLE_LABEL).columns
    chosen = as_images(images.select_columns([image, label]), image, None)
    splits, _, _ = encode({"images": chosen}, label)
    return splits["images"]


def _split(images: Dataset, first: int, second: int) -> tuple[Dataset, Dataset]:
    """Two disjoint parts with the same shares of classes; both shrink alike if there are too few images."""
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
