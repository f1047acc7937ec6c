"""Everything that a person should know of a dataset is found before the first step."""

from __future__ import annotations

import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from peft_bsr import DatasetError
from peft_bsr.data import check_images, load_images, put_aside, refuse_bad


@pytest.fixture
def messy(put):
    """Two truncated files, one empty, one text; a photo in two splits; classes in one split only; 16 bits."""
    folder = put("train/a", "train/b", "val/a", "val/c", n=6, ending="jpg")
    whole = (folder / "train/a/0.jpg").read_bytes()
    (folder / "train/a/1.jpg").write_bytes(whole[:-100])
    (folder / "train/b/2.jpg").write_bytes(whole[:300])
    (folder / "val/a/3.jpg").write_bytes(b"")
    (folder / "val/a/4.jpg").write_text("text")
    shutil.copy(folder / "train/a/0.jpg", folder / "val/a/copy.jpg")
    Image.fromarray(np.zeros((5, 70), np.uint16)).save(folder / "train/b/deep.png")
    return folder


def test_a_report(messy):
    report, clean = check_images(load_images(str(messy)), progress=False)
    assert [bad.name.removeprefix(f"{messy}/") for bad in report.bad] == [
        "train/a/1.jpg",
        "train/b/2.jpg",
        "val/a/3.jpg",
        "val/a/4.jpg",
    ]
    assert "runcated" in report.bad[0].reason
    assert report.bad[3].reason == "is not an image"
    assert report.counts == {"train": {"a": 5, "b": 6, "c": 0}, "validation": {"a": 5, "b": 0, "c": 6}}
    assert report.modes == {"RGB": 21, "I;16": 1}
    assert (report.widths, report.heights) == ((20, 20, 70), (5, 30, 30))
    assert report.duplicates == [[f"train: {messy}/train/a/0.jpg", f"validation: {messy}/val/a/copy.jpg"]]
    assert report.unseen == ["c"]
    assert report.few == {}
    assert {split: len(rows) for split, rows in clean.splits.items()} == {"train": 11, "validation": 11}
    said = "\n".join(report.findings())
    assert "classes without a training image: c" in said
    assert "modes other than 8 bits: I;16" in said
    with pytest.raises(DatasetError) as raised:
        refuse_bad(report, skip=False)
    assert all(bad.name in str(raised.value) for bad in report.bad)
    refuse_bad(report, skip=True)


def test_nothing_to_say(put):
    report, clean = check_images(put_aside(load_images(str(put("a", "b", n=10)))), progress=False)
    assert report.findings() == []
    assert {split: len(rows) for split, rows in clean.splits.items()} == {"train": 14, "validation": 2, "test": 4}


def test_small_classes_are_named(put):
    put("a", n=1)
    report, _ = check_images(load_images(str(put("b", n=9))), progress=False)
    assert report.findings() == ["classes with fewer than 5 images: a (1)"]


def test_rows_without_an_image(tmp_path, picture):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [picture(), None, picture()], "label": ["a", "b", "b"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    report, clean = check_images(load_images(str(tmp_path / "t.parquet")), progress=False)
    assert report.notes == ["train: 1 of 3 rows have no image and are skipped"]
    assert (report.bad, clean.train["label"][:]) == ([], [0, 1])


def test_rows_of_bytes_are_called_by_their_number(tmp_path):
    rows = {"image": [b"text"] * 2, "label": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    report, clean = check_images(load_images(str(tmp_path / "t.parquet")), progress=False)
    assert [bad.name for bad in report.bad] == ["row 0 of train", "row 1 of train"]
    assert clean.splits == {}


def test_a_file_that_is_not_there_is_bad(put):
    folder = put("i")
    (folder / "t.csv").write_text("file_name,label\ni/0.png,a\ni/9.png,b\n")
    report, _ = check_images(load_images(str(folder / "t.csv")), progress=False)
    assert [bad.reason for bad in report.bad] == ["there is no file"]


def test_sizes_are_upright(tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a" / "x.jpg", exif=exif)
    report, _ = check_images(load_images(str(tmp_path)), progress=False)
    assert (report.widths[0], report.heights[0]) == (20, 40)
