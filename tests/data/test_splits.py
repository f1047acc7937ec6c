"""What is put aside: by class, always the same, nothing that cannot be spared, and nothing without a word."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from peft_bsr import DatasetError
from peft_bsr.data import LabelledImages, choose, draw_for_trial, labels_of, put_aside


def data_of(*counts, **others):
    """So many images of classes a, b, ...; the column `image` holds their numbers."""
    names = [chr(97 + i) for i in range(len(counts))]
    splits = {}
    for split, sizes in {"train": counts, **others}.items():
        labels = [number for number, size in enumerate(sizes) for _ in range(size)]
        features = Features({"image": Value("int64"), "label": ClassLabel(names=names)})
        splits[split] = Dataset.from_dict({"image": list(range(len(labels))), "label": labels}, features=features)
    return LabelledImages("them", splits, names)


def sizes(data):
    return {split: list(data.counts(split).values()) for split in data.splits}


@pytest.mark.parametrize(
    ("counts", "test", "validation"),
    [
        ((20, 20), [4, 4], [2, 2]),
        ((100, 10), [20, 2], [8, 1]),
        ((2, 2, 2, 2, 2), [1] * 5, None),
        ((3,) * 200, [1] * 200, None),
        ((4, 10), [1, 2], [1, 1]),
        ((1, 10), [0, 2], [0, 1]),
        ((1, 1), None, None),
    ],
    ids=str,
)
def test_each_class_gives_what_it_can_spare(counts, test, validation):
    data = put_aside(data_of(*counts))
    found = sizes(data)
    assert (found.get("test"), found.get("validation")) == (test, validation)
    assert all(found["train"]), "every class has a training image"
    assert np.add.reduce(list(found.values())).tolist() == list(counts)
    numbers = [n for rows in data.splits.values() for n in rows["image"]]
    assert sorted(numbers) == list(range(sum(counts))), "no image is in two splits"


def test_it_is_always_the_same():
    first, second = (put_aside(data_of(50, 50)).test["image"][:] for _ in range(2))
    assert first == second
    assert first != put_aside(data_of(50, 50), seed=1).test["image"][:]


def test_a_class_with_one_image_is_named():
    notes = put_aside(data_of(1, 10)).notes
    assert "test: no images are held out of classes with 1 training image: a (1)" in notes
    assert "test: 2 of the 11 training images are held out, by class" in notes


@pytest.mark.parametrize(
    ("given", "splits"),
    [
        ({"test": (4, 4)}, {"train": [18, 18], "validation": [2, 2], "test": [4, 4]}),
        ({"validation": (4, 4)}, {"train": [20, 20], "validation": [4, 4]}),
        ({"validation": (4, 4), "test": (1, 1)}, {"train": [20, 20], "validation": [4, 4], "test": [1, 1]}),
    ],
    ids=str,
)
def test_splits_that_are_there_stay(given, splits):
    assert sizes(put_aside(data_of(20, 20, **given))) == splits


@pytest.mark.parametrize(
    ("asked", "splits"),
    [
        ({"test_size": 0, "validation_size": 0}, {"train": [20, 20]}),
        ({"test_size": 10, "validation_size": 0}, {"train": [15, 15], "test": [5, 5]}),
        ({"test_size": 0.5, "validation_size": 0.5}, {"train": [5, 5], "validation": [5, 5], "test": [10, 10]}),
    ],
    ids=str,
)
def test_sizes_are_shares_or_numbers(asked, splits):
    assert sizes(put_aside(data_of(20, 20), **asked)) == splits


REFUSED = [
    (data_of(5, 5, test=(1, 1)), {"test_size": 0.3}, "`--test-size 0.3`: `them` already has a test split."),
    (data_of(5, 5), {"test_size": 1.5}, "must be a share below 1, or a number of images below 10"),
    (data_of(5, 5), {"validation_size": -1}, "must be a share below 1"),
    (data_of(5, 5), {"test_size": 10}, "must be a share below 1"),
    (data_of(5), {}, "has only one class to train on, `a`"),
    (
        LabelledImages("them", {"test": data_of(5, 5).train}, ["a", "b"]),
        {},
        "has only test: there are no images to train",
    ),
]


@pytest.mark.parametrize(("data", "asked", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_what_cannot_be(data, asked, message):
    with pytest.raises(DatasetError) as raised:
        put_aside(data, **asked)
    assert message in str(raised.value)


def test_a_trial_draws_a_few_and_no_test_images():
    data = put_aside(data_of(20, 20, test=(1, 2)))
    few = draw_for_trial(data, 9)
    assert {split: len(rows) for split, rows in few.splits.items()} == {"train": 9, "validation": 4}
    assert few.notes[-1] == "train: 9 of 36 images are selected at random"
    assert set(few.train["image"]) < set(data.train["image"]), "where validation images are not"
    assert draw_for_trial(data, 9).train["image"][:] == few.train["image"][:]
    with pytest.raises(DatasetError, match="has no validation images"):
        draw_for_trial(put_aside(data_of(20, 20), validation_size=0), 9)


def test_what_is_scored():
    alone, both = data_of(20, 20), data_of(20, 20, validation=(3, 3))
    split, rows, notes = choose(alone)
    assert (split, len(rows)) == ("all", 40)
    assert notes == [
        "there is no test split: all 40 images are scored. If the model was trained on this dataset, most of them are "
        "its training images, and the scores are too good: `--split test` scores those that `train` held out"
    ]
    assert len(choose(both)[1]) == 46
    assert choose(data_of(20, 20, test=(1, 2)))[:1] == ("test",)
    assert len(choose(both, "val")[1]) == 6
    aside = put_aside(alone, 0.3)
    assert choose(alone, "test", 0.3)[1]["image"][:] == aside.test["image"][:], (
        "those that a training run was scored on"
    )
    with pytest.raises(DatasetError, match="has no folds split, only train"):
        choose(alone, "folds")


def test_labels_are_read_without_the_images():
    assert labels_of(data_of(1, 2).train).tolist() == [0, 1, 1]
