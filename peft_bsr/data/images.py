"""Image datasets, with labels for training and evaluation, or without for prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, concatenate_datasets

from peft_bsr.data.columns import as_images, image_column
from peft_bsr.data.folders import check_names, image_endings, list_images
from peft_bsr.data.labels import encode
from peft_bsr.data.rows import DIGITS, TABLES, read_rows, read_table, some, split_of
from peft_bsr.data.targets import find_target
from peft_bsr.data.vectors import encode_vectors
from peft_bsr.errors import DatasetError
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType


@dataclass(frozen=True)
class LabelledImages:
    """Images of one dataset.

    Attributes:
        name: Name that was passed to `load_images`.
        splits: `"train"`, `"validation"`, `"test"`, as far as they exist -> rows with the columns `image` and `label`:
            the index of a class; for several labels a vector of 0 and 1; for a regression a vector of values. Without
            splits, all rows are `"train"`.
        labels: Names of the classes, or of the values, by index.
        notes: Decisions and skipped rows while reading, one sentence each.
        problem_type: As in transformers' configurations.
    """

    name: str
    splits: dict[str, Dataset]
    labels: list[str]
    notes: list[str] = field(default_factory=list)
    problem_type: ProblemType = SINGLE_LABEL

    @property
    def train(self) -> Dataset:
        """Rows to train on."""
        return self._get("train")

    @property
    def validation(self) -> Dataset | None:
        """Rows to evaluate each epoch on, or None."""
        return self.splits.get("validation")

    @property
    def test(self) -> Dataset:
        """Rows to evaluate the trained model on, once."""
        return self._get("test")

    def counts(self, split: str) -> dict[str, int]:
        """Class -> number of its images in a split. Empty for a regression.

        Args:
            split: One of `splits`.
        """
        if self.problem_type == REGRESSION:
            return {}
        found = labels_of(self.splits[split])
        numbers = np.bincount(found, minlength=len(self.labels)) if found.ndim == 1 else found.sum(axis=0).astype(int)
        return dict(zip(self.labels, numbers.tolist(), strict=True))

    def label_text(self, label: Any) -> str:
        """A label as text: `daisy`; `cat, dog`; `age 31`.

        Args:
            label: Label of a row.
        """
        if self.problem_type == SINGLE_LABEL:
            return self.labels[int(label)]
        pairs = [(name, float(value)) for name, value in zip(self.labels, label, strict=True)]
        if self.problem_type == REGRESSION:
            return ", ".join(f"{name} {value:.4g}" for name, value in pairs)
        return ", ".join(name for name, value in pairs if value) or "none"

    def describe(self) -> str:
        """The task in one line, by the training images, or all images if there are none; at most 10 classes or values.

        `3 classes: daisy (24), rose (30), tulip (28)`; `multi-label, 2 labels: cat (3), dog (5)`;
        `regression, 1 value: age (1 to 90)`.
        """
        splits = ["train"] if "train" in self.splits else list(self.splits)
        if self.problem_type == REGRESSION:
            values = np.concatenate([labels_of(self.splits[split]) for split in splits])
            ends = zip(self.labels, values.min(axis=0), values.max(axis=0), strict=True)
            named = some([f"{name} ({low:.4g} to {high:.4g})" for name, low, high in ends])
            return f"regression, {len(self.labels)} value{'s' * (len(self.labels) != 1)}: {named}"
        counts = {label: sum(self.counts(split)[label] for split in splits) for label in self.labels}
        named = some([f"{label} ({count})" for label, count in counts.items()])
        if self.problem_type == MULTI_LABEL:
            return f"multi-label, {len(counts)} label{'s' * (len(counts) != 1)}: {named}"
        return f"{len(counts)} class{'es' if len(counts) != 1 else ''}: {named}"

    def _get(self, split: str) -> Dataset:
        if split not in self.splits:
            raise DatasetError(f"`{self.name}` has no {split} split, only {some(list(self.splits))}.")
        return self.splits[split]


def load_images(
    name: str = DIGITS,
    *,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
    labels: Sequence[str] | None = None,
) -> LabelledImages:
    """Images and labels of a dataset. No image is decoded.

    Args:
        name: `"digits"` (scikit-learn's, without network), a folder, a table (`.csv`, `.tsv`, `.jsonl`, `.json`,
            `.parquet`) or the id of a dataset on the Hub. A folder contains images by class, at any depth below the
            class; or folders train, validation and test of such; or images and a `metadata.csv`.
        image_column: Column of images in a table or a dataset. Default None: the only candidate.
        label_column: Column of labels; or several columns of 0 and 1, or of values, as a list or as `"a,b,c"`.
        problem_type: One class per image, several labels, or a regression. Default None: determined from the labels,
            see `peft_bsr.data.targets.find_target`; integers are classes.
        labels: Names of a model's classes or values, to match by name. Default None: those of the data.

    Raises:
        DatasetError: If there is no dataset of that name, if it has no images or no labels, or if several columns are
            candidates.
    """
    rows = read_rows(name)
    try:
        first = next(iter(rows.splits.values()))
        images, *notes = _image_column(first, image_column)
        target = find_target(first, images, label_column, problem_type, labels)
        columns = {images, *target.columns}
        splits = {
            split: data.select_columns(sorted(columns & set(data.column_names))) for split, data in rows.splits.items()
        }
        for split, data in splits.items():
            if set(data.column_names) != columns:
                raise DatasetError(f"the {split} split has no column {some(sorted(columns - set(data.column_names)))}.")
        splits = {split: as_images(data, images, rows.root) for split, data in splits.items()}
        if target.problem_type == SINGLE_LABEL:
            classes = "image" if target.columns == [images] else target.columns[0]
            encoded, names, left = encode(splits, classes, labels)
        else:
            encoded, names, left = encode_vectors(splits, target, labels)
    except DatasetError as error:
        raise DatasetError(f"`{name}`: {error}") from error
    empty = [split for split in splits if split not in encoded]
    left += [f"the {split} split is skipped" for split in empty]
    said = [*rows.notes, *filter(None, notes), *target.notes, *left]
    return LabelledImages(name, encoded, names, said, target.problem_type)


def load_unlabelled(inputs: Sequence[str], *, image_column: str | None = None, split: str | None = None) -> Dataset:
    """Images to predict, in the column `image`; other columns are not changed.

    Args:
        inputs: Image files, folders (all images in them, at any depth), or one table or dataset. Rows stay in
            their order. A folder of tables or of a saved dataset is read as in training, if it has no image files.
        image_column: Column of images in a table or a dataset. Default None: the only candidate.
        split: Split of a dataset, or its folder. Default None: all splits.

    Raises:
        DatasetError: If there is nothing of that name, or no image in it.
    """
    files: list[str] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir() and split is None:
            files += [str(path / file) for file in list_images(path)[0]]
        elif path.is_file() and path.suffix.lower() not in TABLES:
            files.append(str(path))
        elif len(inputs) > 1:
            raise DatasetError(f"there is no file or folder `{name}`.")
        else:
            return _rows_of(name, image_column, split)
    if not files:
        if len(inputs) == 1 and any(file.suffix.lower() in TABLES for file in list_images(path)[1]):
            return _rows_of(name, image_column, split)
        raise DatasetError(f"there are no images in {some(list(inputs))} that Pillow can read.")
    check_names(files)
    return Dataset.from_dict({"image": files}, features=Features({"image": Image()}))


def labels_of(images: Dataset) -> np.ndarray:
    """Class indices [N], or vectors [N, C], without decoding an image.

    Args:
        images: Rows with the column `label`.
    """
    labels: np.ndarray = images.select_columns(["label"]).with_format("numpy")[:]["label"]
    return labels


def _rows_of(name: str, column: str | None, split: str | None) -> Dataset:
    path = Path(name).expanduser()
    if split is None and path.is_file():
        rows = read_table(path, "train")  # not divided by a column of splits
    elif split is None and not path.exists() and path.suffix.lower() in image_endings():
        raise DatasetError(f"there is no file `{name}`.")
    else:
        rows = read_rows(name)
    wanted = list(rows.splits) if split is None else [split_of(split) or split]
    if wanted[0] not in rows.splits:
        raise DatasetError(f"`{name}` has no {split} split, only {some(list(rows.splits))}.")
    data = concatenate_datasets([rows.splits[one] for one in wanted])
    return as_images(data, _image_column(data, column)[0], rows.root)


_image_column = image_column  # an argument has the name of the function

__all__ = ["LabelledImages", "labels_of", "load_images", "load_unlabelled"]
