"""Data sets of images, with labels for training and scoring, or without for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, concatenate_datasets

from peft_bsr.data.columns import as_images, image_column, label_column
from peft_bsr.data.folders import image_endings, list_images
from peft_bsr.data.labels import encode
from peft_bsr.data.rows import DIGITS, read_rows, read_table, some, split_of
from peft_bsr.errors import DatasetError


@dataclass(frozen=True)
class LabelledImages:
    """Images of one data set.

    Attributes:
        name: What it was asked for by.
        splits: `"train"`, `"validation"`, `"test"`, those that there are -> rows with the columns `image` and `label`.
            Without splits, all of them are `"train"`.
        labels: Names of the classes, by number.
        notes: What was decided and left out when it was read, one sentence each.
        problem_type: As in transformers' configurations.
    """

    name: str
    splits: dict[str, Dataset]
    labels: list[str]
    notes: list[str] = field(default_factory=list)
    problem_type: str = "single_label_classification"

    @property
    def train(self) -> Dataset:
        """Rows to train on."""
        return self._get("train")

    @property
    def validation(self) -> Dataset | None:
        """Rows to score epochs on, or None."""
        return self.splits.get("validation")

    @property
    def test(self) -> Dataset:
        """Rows to score the trained model on, once."""
        return self._get("test")

    def counts(self, split: str) -> dict[str, int]:
        """Class -> images of a split.

        Args:
            split: One of `splits`.
        """
        numbers = np.bincount(labels_of(self.splits[split]), minlength=len(self.labels))
        return dict(zip(self.labels, numbers.tolist(), strict=True))

    def describe(self) -> str:
        """`3 classes: daisy (24), rose (30), tulip (28)`: training images, or else all; 10 classes at most."""
        splits = ["train"] if "train" in self.splits else list(self.splits)
        counts = {label: sum(self.counts(split)[label] for split in splits) for label in self.labels}
        named = some([f"{label} ({count})" for label, count in counts.items()])
        return f"{len(counts)} class{'es' if len(counts) != 1 else ''}: {named}"

    def _get(self, split: str) -> Dataset:
        if split not in self.splits:
            raise DatasetError(f"`{self.name}` has no {split} split, only {some(list(self.splits))}.")
        return self.splits[split]


def load_images(
    name: str = DIGITS,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: Sequence[str] | None = None,
) -> LabelledImages:
    """Images and labels of a data set. Nothing is decoded.

    Args:
        name: `"digits"` (scikit-learn's, without network), a folder, a table (`.csv`, `.tsv`, `.jsonl`, `.json`,
            `.parquet`) or the id of a data set on the Hub. Folders hold images by class, at any depth below the class;
            or folders train, validation and test of such; or images and a `metadata.csv`.
        image_column: Of a table or a data set. Default None: the one there is.
        label_column: The same.
        labels: Names of a model's classes: rows are matched with them by name. Default None: the classes of the data.

    Raises:
        DatasetError: If there is none of that name, or if it has no images or no class labels, or if several columns
            may be meant.
    """
    rows = read_rows(name)
    try:
        first = next(iter(rows.splits.values()))
        images, *notes = _image_column(first, image_column)
        classes, *more = _label_column(first, images, label_column)
        columns = {images, classes}
        splits = {
            split: data.select_columns(sorted(columns & set(data.column_names))) for split, data in rows.splits.items()
        }
        for split, data in splits.items():
            if set(data.column_names) != columns:
                raise DatasetError(f"the {split} split has no column {some(sorted(columns - set(data.column_names)))}.")
        splits = {split: as_images(data, images, rows.root) for split, data in splits.items()}
        encoded, names, left = encode(splits, "image" if classes == images else classes, labels)
    except DatasetError as error:
        raise DatasetError(f"`{name}`: {error}") from error
    empty = [split for split in splits if split not in encoded]
    left += [f"the {split} split is left out" for split in empty]
    return LabelledImages(name, encoded, names, [*rows.notes, *filter(None, notes + more), *left])


def load_unlabelled(inputs: Sequence[str], *, image_column: str | None = None, split: str | None = None) -> Dataset:
    """Images to predict, in the column `image`; other columns stay as they are.

    Args:
        inputs: Files of images, folders (all images in them, at any depth), or one table or data set.
        image_column: Of a table or a data set. Default None: the one there is.
        split: Of a data set, or its folder. Default None: all of it.

    Raises:
        DatasetError: If there is nothing of that name, or no image in it.
    """
    files: list[str] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir() and split is None:
            files += [str(path / file) for file in list_images(path)[0]]
        elif path.is_file() and path.suffix.lower() not in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
            files.append(str(path))
        elif len(inputs) > 1:
            raise DatasetError(f"there is no file or folder `{name}`.")
        else:
            return _rows_of(name, image_column, split)
    if not files:
        raise DatasetError(f"there are no images in {some(list(inputs))} that Pillow reads.")
    return Dataset.from_dict({"image": files}, features=Features({"image": Image()}))


def labels_of(images: Dataset) -> np.ndarray:
    """[N] numbers of classes, without decoding an image.

    Args:
        images: With the column `label`.
    """
    labels: np.ndarray = images.select_columns(["label"]).with_format("numpy")[:]["label"]
    return labels


def _rows_of(name: str, column: str | None, split: str | None) -> Dataset:
    path = Path(name).expanduser()
    if split is None and path.is_file():
        rows = read_table(path)
    elif split is None and not path.exists() and path.suffix.lower() in image_endings():
        raise DatasetError(f"there is no file `{name}`.")
    else:
        rows = read_rows(name)
    wanted = list(rows.splits) if split is None else [split_of(split) or split]
    if wanted[0] not in rows.splits:
        raise DatasetError(f"`{name}` has no {split} split, only {some(list(rows.splits))}.")
    data = concatenate_datasets([rows.splits[one] for one in wanted])
    return as_images(data, _image_column(data, column)[0], rows.root)


_image_column, _label_column = image_column, label_column  # arguments are called like the functions

__all__ = ["LabelledImages", "labels_of", "load_images", "load_unlabelled"]
