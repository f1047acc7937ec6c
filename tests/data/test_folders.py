"""What is a class and what a split is read from the form of a folder, never guessed from parts of names."""

from __future__ import annotations

import os

import pytest

from peft_bsr import DatasetError
from peft_bsr.data import load_images, load_unlabelled


def sizes(data):
    return {split: len(rows) for split, rows in data.splits.items()}


@pytest.mark.parametrize(
    "classes",
    [
        ["bus-stop", "train-station", "train-depot"],
        ["test_tube", "dev.board", "eval board"],
        ["train", "bus", "validation"],
        ["10", "9", "-1"],
        ["nan", "None", "__background__"],
    ],
    ids=str,
)
def test_every_folder_is_a_class(put, classes):
    data = load_images(str(put(*classes)))
    assert sizes(data) == {"train": 3 * len(classes)}
    assert sorted(data.labels) == sorted(classes)
    assert set(data.counts("train").values()) == {3}


def test_numbers_are_in_numeric_order(put):
    assert load_images(str(put("10", "9", "0"))).labels == ["0", "9", "10"]


def test_the_class_is_the_first_folder_at_any_depth(put):
    data = load_images(str(put("daisy/2023/may", "daisy/2024", "rose/2023", "rose")))
    assert data.describe() == "2 classes: daisy (6), rose (6)"
    data = load_images(str(put("s/train/daisy/2023", "s/train/rose/a/b", "s/val/rose", "s/val/daisy/x") / "s"))
    assert (sizes(data), data.labels) == ({"train": 6, "validation": 6}, ["daisy", "rose"])


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "dev", "Testing"), ("train", "eval", "test")])
def test_exact_names_are_splits_if_they_hold_classes(put, names):
    folder = put(*(f"{name}/{label}" for name in names for label in "ab"))
    assert sizes(load_images(str(folder))) == {"train": 6, "validation": 6, "test": 6}


@pytest.mark.parametrize("form", ["classes", "splits", "metadata", "table"])
def test_a_relative_name(put, monkeypatch, form):
    folder = put("d/train/a", "d/train/b") / "d"
    monkeypatch.chdir(folder.parent)
    rows = "file_name,label\n" + "\n".join(f"train/{c}/{i}.png,{c}" for c in "ab" for i in range(3))
    if form in ("metadata", "table"):
        (folder / f"{form}.csv").write_text(rows)
    name = {"classes": "d/train", "table": "d/table.csv"}.get(form, "d")
    data = load_images(name)
    assert data.counts("train") == {"a": 3, "b": 3}
    assert data.train[0]["image"].size == (20, 30)


def test_only_a_test_split(put):
    assert sizes(load_images(str(put("test/a", "test/b")))) == {"test": 6}


def test_a_test_split_without_labels_is_left_out_with_a_note(put):
    data = load_images(str(put("train/a", "train/b", "test")))
    assert sizes(data) == {"train": 6}
    assert data.notes == ["test: 3 of 3 rows have no label and are skipped", "the test split is skipped"]


def test_what_is_not_read_is_said(put):
    folder = put("a", "b", ".")
    (folder / "a" / "x.heic").write_bytes(b"x")
    (folder / "a" / "._0.png").write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "0.png").write_bytes(b"x")
    (folder / "empty").mkdir()
    assert load_images(str(folder)).notes == [
        "not read, because their extension is not that of an image: .heic (1)",
        "folders without images: empty",
        "train: 3 of 9 rows have no label and are skipped",
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "test"], "there are no class folders in test, train"),
        (["train/a", "train/b", "extra"], "but these next to them would not be read: extra."),
        (["train/a", "val/a", "valid/a"], "val, valid are both the validation split"),
        (["."], "there are no class folders; the 3 images are directly in it. Put the images"),
        ([], "it contains no images"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_one_error(put, folders, message):
    with pytest.raises(DatasetError) as raised:
        load_images(str(put(*folders)))
    assert message in str(raised.value)


def test_a_file_name_that_is_not_utf_8(put):
    folder = put("a", "b")
    odd = os.fsencode(folder / "a") + b"/caf\xe9.png"
    try:
        os.rename(folder / "a" / "0.png", odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    for read in (lambda: load_images(str(folder)), lambda: load_unlabelled([os.fsdecode(odd)])):
        with pytest.raises(DatasetError, match=r"not in UTF-8: 1, such as b'.*caf\\xe9\.png'\. Rename"):
            read()


def test_links_are_followed_once(put, tmp_path):
    folder = put("a", "b", "elsewhere/more")
    (folder / "a" / "loop").symlink_to(folder / "a")
    (folder / "b" / "more").symlink_to(folder / "elsewhere" / "more")
    assert load_images(str(folder)).counts("train") == {"a": 3, "b": 6}, (
        "each folder of images is read where it is met first"
    )
