"""Classes of data and classes of a model are matched by name; what differs is said exactly."""

from __future__ import annotations

import pytest

from peft_bsr import DatasetError
from peft_bsr.data import load_images

NAMES = [f"k{i:02d}" for i in range(25)]


def test_a_subset_is_scored_and_said(put):
    data = load_images(str(put(*NAMES[:-1], n=1)), labels=NAMES)
    assert data.labels == NAMES
    assert data.notes == ["24 of the model's 25 classes are scored; there are no images of: k24"]


def test_numbers_are_the_models(put):
    data = load_images(str(put("a", "b", n=1)), labels=["b", "x", "a"])
    assert data.train["label"][:] == [2, 0]


def test_classes_that_the_model_does_not_know_are_all_named(put):
    with pytest.raises(DatasetError) as raised:
        load_images(str(put("a", "y", "z", n=1)), labels=["a", "b"])
    assert str(raised.value).endswith(
        "the model does not know 2 of the 3 classes: y, z. Of its own 2 classes there are no images of: b."
    )


def test_default_names_are_matched_by_number(put):
    folder = put("cat", "dog", n=1)
    data = load_images(str(folder), labels=["LABEL_0", "LABEL_1"])
    assert data.labels == ["cat", "dog"]
    assert data.notes == ["the model's classes have no names: they are matched by index, 0 is `cat`"]
    with pytest.raises(DatasetError, match="and there are 3 of them; the data have 2: cat, dog"):
        load_images(str(folder), labels=["LABEL_0", "LABEL_1", "LABEL_2"])


def test_letters_with_accents_are_one_name(put):
    assert load_images(str(put("e\u0301te\u0301", "b", n=1)), labels=["b", "\u00e9t\u00e9"]).train["label"][:] == [0, 1]
