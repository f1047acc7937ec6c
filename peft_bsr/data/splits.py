"""Splits: validation for epochs, test once at the end. Missing splits are held out from the training images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from datasets import Dataset, concatenate_datasets

from peft_bsr.data.images import LabelledImages, labels_of
from peft_bsr.data.rows import SPLITS, some, split_of
from peft_bsr.errors import DatasetError
from peft_bsr.problem_type import REGRESSION, SINGLE_LABEL

TEST_SIZE, VALIDATION_SIZE = 0.2, 0.1  # shares of the training images


def put_aside(
    data: LabelledImages, test_size: float | None = None, validation_size: float | None = None, seed: int = 0
) -> LabelledImages:
    """Hold out a test and a validation split from the training images, if they are missing.

    Images are drawn by class, always the same for the same images. The test split gets at least one image of every
    class that has two, the validation split at least one of every class that has three left. With several labels per
    image, and for a regression, they are drawn from all images.

    Args:
        data: From `load_images`.
        test_size: Share of the training images (below 1) or number of them (from 1). Default None: 0.2 if there is
            neither a test nor a validation split; 0 for none.
        validation_size: The same for the remaining images. Default None: 0.1 if there is no validation split.
        seed: Random seed, default 0.

    Raises:
        DatasetError: If there are no training images or only one class, if a size is invalid, or if one is given for a
            split that exists.
    """
    for split, size in (("test", test_size), ("validation", validation_size)):
        if size and split in data.splits:
            raise DatasetError(f"`--{split}-size {size}`: `{data.name}` already has a {split} split.")
    if "train" not in data.splits:
        raise DatasetError(f"`{data.name}` has only {some(list(data.splits))}: there are no images to train on.")
    if test_size is None:
        test_size = 0 if {"test", "validation"} & set(data.splits) else TEST_SIZE
    if validation_size is None:
        validation_size = 0 if "validation" in data.splits else VALIDATION_SIZE
    _check_different(data)
    for split, size, left in (("test", test_size, 1), ("validation", validation_size, 2)):
        if size:
            data = _drawn(data, split, size, left, seed)
    ordered = {split: data.splits[split] for split in SPLITS if split in data.splits}
    return replace(data, splits=ordered)


def draw_for_trial(data: LabelledImages, images: int, seed: int = 0) -> LabelledImages:
    """A random choice of training and validation images for a short run, always the same; no test images.

    Args:
        data: From `put_aside`.
        images: Maximum number of images of each split.
        seed: Random seed, default 0.

    Raises:
        DatasetError: If there are no validation images.
    """
    if data.validation is None:
        raise DatasetError(f"`{data.name}` has no validation images. Give more images, or `--validation-size`.")
    splits, notes = {}, []
    for split in ("train", "validation"):
        rows = splits[split] = data.splits[split]
        if len(rows) > images:
            drawn = np.random.default_rng(seed).permutation(len(rows))[:images]
            splits[split] = rows.select(np.sort(drawn))
            notes.append(f"{split}: {images} of {len(rows)} images are selected at random")
    return replace(data, splits=splits, notes=[*data.notes, *notes])


def choose(
    data: LabelledImages,
    split: str | None = None,
    test_size: float | None = None,
    validation_size: float | None = None,
) -> tuple[str, Dataset, list[str]]:
    """The images to evaluate: the name of the split, its rows, and notes.

    Args:
        data: From `load_images`.
        split: Name of the split; a missing one is the part that `put_aside` holds out. Default None: the test split,
            or all images if there is none.
        test_size: See `put_aside`.
        validation_size: See `put_aside`.

    Raises:
        DatasetError: If there is no such split.
    """
    if split is None:
        if "test" in data.splits:
            return "test", data.splits["test"], []
        rows = concatenate_datasets(list(data.splits.values()))
        note = f"there is no test split: all {len(rows)} images are scored"
        if "train" in data.splits:
            note += (
                ". If the model was trained on this dataset, most of them are its training images, and the scores "
                "are too good: `--split test` scores those that `train` held out"
            )
        return "all", rows, [note]
    wanted = split_of(split) or split
    if wanted not in data.splits and wanted in SPLITS and "train" in data.splits:
        aside = put_aside(data, test_size, validation_size)
        if wanted in aside.splits:
            return wanted, aside.splits[wanted], aside.notes[len(data.notes) :]
    if wanted not in data.splits:
        raise DatasetError(f"`{data.name}` has no {split} split, only {some(list(data.splits))}.")
    return wanted, data.splits[wanted], []


def _check_different(data: LabelledImages) -> None:
    """Refuse training images that all have the same label."""
    labels = labels_of(data.train)
    if data.problem_type == SINGLE_LABEL:
        if len(np.unique(labels)) < 2:
            raise DatasetError(
                f"`{data.name}` has only one class to train on, `{data.labels[0]}`. If "
                "the classes are folders inside it, give that folder."
            )
        return
    same = labels.min(axis=0) == labels.max(axis=0)
    if data.problem_type == REGRESSION and same.any():
        name, value = data.labels[same.argmax()], labels[0, same.argmax()]
        raise DatasetError(f"`{data.name}`: `{name}` is {value:.4g} in all {len(labels)} training rows. Remove it.")
    if same.all():
        raise DatasetError(f"`{data.name}`: all {len(labels)} training images have the same labels.")


def _drawn(data: LabelledImages, split: str, size: float, left: int, seed: int) -> LabelledImages:
    labels = labels_of(data.splits["train"])
    if not (0 < size < 1 or (size == int(size) and 1 <= size < len(labels))):
        raise DatasetError(
            f"`--{split}-size {size}` must be a share below 1, or a number of images below {len(labels)}."
        )
    share = size if size < 1 else size / len(labels)
    generator = np.random.default_rng(seed)
    drawn, without = np.zeros(len(labels), dtype=bool), []
    is_by_class = data.problem_type == SINGLE_LABEL
    groups = [labels == number for number in range(len(data.labels))] if is_by_class else [np.ones_like(drawn)]
    for name, group in zip(data.labels if is_by_class else ["all images"], groups, strict=True):
        members = np.flatnonzero(group)
        if len(members) > left:
            count = min(max(round(share * len(members)), 1), len(members) - left)
            drawn[generator.permutation(members)[:count]] = True
        elif len(members):
            without.append(f"{name} ({len(members)})")
    how = "by class" if is_by_class else "at random, not by label"
    notes = [f"{split}: {drawn.sum()} of the {len(labels)} training images are held out, {how}"]
    if without:
        notes.append(
            f"{split}: no images are held out of classes with {left} training image{'s or less' if left > 1 else ''}: "
            + some(without)
        )
    if not drawn.any():
        return replace(data, notes=[*data.notes, notes[-1]])
    parts = {
        "train": data.splits["train"].select(np.flatnonzero(~drawn)),
        split: data.splits["train"].select(np.flatnonzero(drawn)),
    }
    return replace(data, splits=data.splits | parts, notes=[*data.notes, *notes])


__all__ = ["TEST_SIZE", "VALIDATION_SIZE", "choose", "draw_for_trial", "put_aside"]
