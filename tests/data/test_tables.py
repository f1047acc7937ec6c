"""CSV, JSON lines, parquet and metadata beside images: columns, paths, labels of texts and numbers."""

from __future__ import annotations

import io
import json

import datasets
import pytest

from peft_bsr import DatasetError
from peft_bsr.data import load_images, load_unlabelled
from peft_bsr.problem_type import SINGLE_LABEL


def write(path, header, rows):
    path.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    return str(path)


@pytest.fixture
def parquet(tmp_path, picture):
    """`parquet({"label": [0, 1]}, label=datasets.Value("int64"))`: as many images as labels."""

    def make(columns, images=None, **features):
        count = len(next(iter(columns.values())))
        images = [picture() for _ in range(count)] if images is None else images
        kinds = datasets.Features({"image": datasets.Image(), **features})
        datasets.Dataset.from_dict({"image": images, **columns}, features=kinds).to_parquet(tmp_path / "t.parquet")
        return str(tmp_path / "t.parquet")

    return make


LABELS = {  # values, their type, the names of the rows that have one
    "numbers": ([1, 10, 9, 1], "int64", ["1", "10", "9", "1"]),
    "texts": (["b", "a", "b", "é"], "string", ["b", "a", "b", "é"]),
    "truth values": ([True, False, True, True], "bool", ["True", "False", "True", "True"]),
    "whole floats": ([0.0, 2.0, None, 0.0], "float64", ["0", "2", "0"]),
    "floats with nan": ([0.0, 2.0, float("nan"), 0.0], "float32", ["0", "2", "0"]),
    "minus one": ([0, 3, -1, 0], "int8", ["0", "3", "0"]),
    "no text": (["a", "b", None, ""], "string", ["a", "b"]),
}


@pytest.mark.parametrize(("values", "kind", "names"), LABELS.values(), ids=LABELS)
def test_labels_of_any_kind(parquet, values, kind, names):
    data = load_images(parquet({"label": values}, label=datasets.Value(kind)))
    assert data.labels == sorted(set(names), key=lambda name: int(name) if name.isdigit() else name)
    assert [data.labels[number] for number in data.train["label"]] == names
    left = len(values) - len(names)
    assert data.notes == ([f"train: {left} of 4 rows have no label and are skipped"] if left else [])
    assert isinstance(data.train.features["label"], datasets.ClassLabel)
    assert data.train[0]["image"].size == (20, 30)


def test_class_labels_keep_their_numbers(parquet):
    data = load_images(parquet({"label": [1, 0, -1]}, label=datasets.ClassLabel(names=["z", "a", "unused"])))
    assert (data.labels, data.train["label"][:]) == (["z", "a", "unused"], [1, 0])


def test_text_stays_as_it_is_written(put):
    folder = put("images")
    path = write(
        folder / "t.csv",
        ["file_name", "label"],
        [["images/0.png", "NA"], ["images/1.png", "007"], ["images/2.png", ""]],
    )
    data = load_images(path)
    assert (data.labels, len(data.train)) == (["007", "NA"], 2)
    assert data.train[0]["image"].size == (20, 30)


def test_semicolons_tabs_and_byte_order_marks(put):
    folder = put("i")
    (folder / "t.csv").write_text("\ufefffile_name;label\ni/0.png;a, b\ni/1.png;c\n", encoding="utf-8")
    (folder / "t.tsv").write_text("file_name\tlabel\ni/0.png\ta, b\ni\\1.png\tc\n")
    for name in ("t.csv", "t.tsv"):
        data = load_images(str(folder / name))
        assert data.labels == ["a, b", "c"]
        assert data.train[1]["image"].size == (20, 30)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_beside_images(put, name):
    folder = put("img")
    rows = [("img/0.png", "cat"), ("img/1.png", "dog")]
    if name.endswith("csv"):
        write(folder / name, ["file_name", "label"], rows)
    else:
        (folder / name).write_text("\n".join(json.dumps({"file_name": f, "label": label}) for f, label in rows))
    data = load_images(str(folder))
    assert data.describe() == "2 classes: cat (1), dog (1)"
    assert data.notes == [f"1 of the 3 images are not in {name}"]


def test_metadata_of_splits(put):
    folder = put("train", "test")
    for split in ("train", "test"):
        write(folder / split / "metadata.csv", ["file_name", "label"], [(f"{i}.png", i % 2) for i in range(3)])
    data = load_images(str(folder))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 3, "test": 3}
    assert data.test[0]["image"].size == (20, 30)


def test_a_table_for_each_split(put):
    folder = put("images")
    write(
        folder / "train.csv", ["path", "species"], [("images/0.png", "a"), ("images/1.png", "b"), ("images/1.png", "b")]
    )
    write(folder / "test.csv", ["path", "species"], [("images/2.png", "b")])
    data = load_images(str(folder))
    assert data.counts("test") == {"a": 0, "b": 1}
    assert data.notes[0] == "images are the column `path`"


def test_a_column_of_splits(put):
    folder = put("i")
    rows = [("i/0.png", "a", "train"), ("i/1.png", "b", "train"), ("i/2.png", "b", "val")]
    data = load_images(write(folder / "t.csv", ["image", "label", "split"], rows))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 2, "validation": 1}
    assert "split by the column `split`" in data.notes
    rows[1] = ("i/1.png", "b", "later")
    data = load_images(write(folder / "t.csv", ["image", "label", "split"], rows))
    assert list(data.splits) == ["train"]
    assert "not split by the column `split`, because it also holds `later`" in data.notes


def test_one_of_several_columns_is_named(parquet, picture):
    many = {"kind": [0, 0, 0], "label": [0, 1, 1], "who": ["x", "x", "y"]}
    kinds = {"kind": datasets.ClassLabel(names=["animal"]), "label": datasets.ClassLabel(names=["cat", "dog"])}
    path = parquet(many, **kinds, who=datasets.Value("string"))
    data = load_images(path)
    assert data.labels == ["cat", "dog"]
    assert data.notes == ["labels are the column `label`, not kind, who (change it with `--label-column`)"]
    assert load_images(path, label_column="who").labels == ["x", "y"]


REFUSED = [
    ({"species": ["a", "a"], "who": ["b", "b"]}, {}, "several columns may hold labels: species, who."),
    ({"label": ["a", "a"], "labels": ["b", "b"]}, {}, "Choose one with `--label-column`, or several"),
    ({"species": ["a", "a"]}, {"label_column": "specie"}, "there is no column of this name. Did you mean species"),
    ({"id": ["x", "y"]}, {}, "the columns are image (Image), id (string): none of them holds labels."),
    ({"score": [0.5, 1.5], "who": ["b", "b"]}, {}, "several columns may hold labels: score, who."),
    ({"score": [0.5, 1.5]}, {"label_column": "score", "problem_type": SINGLE_LABEL}, "holds numbers with fractions"),
    (
        {"tags": [["a"], ["a", "b"]]},
        {"label_column": "tags", "problem_type": SINGLE_LABEL},
        "a class is a string or an integer, one per row",
    ),
    ({"label": [-1, -1]}, {}, "none of the 2 rows has a label in the column `label`"),
]


@pytest.mark.parametrize(("columns", "options", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_no_column_is_taken_silently(tmp_path, picture, columns, options, message):
    data = datasets.Dataset.from_dict({"image": [picture(), picture()], **columns})
    data.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DatasetError) as raised:
        load_images(str(tmp_path / "t.parquet"), **options)
    assert message in str(raised.value)
    assert "t.parquet" in str(raised.value)


def test_bytes_and_paths_of_parquet(put, picture):
    folder = put("i")
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    forms = {
        "bytes": [buffer.getvalue()] * 2,
        "paths": ["i/0.png", "i/1.png"],
        "structs of bytes": [{"bytes": buffer.getvalue(), "path": "nowhere.png"}] * 2,
        "structs of paths": [{"bytes": None, "path": "i/0.png"}, {"bytes": None, "path": "i/1.png"}],
    }
    for form, images in forms.items():
        datasets.Dataset.from_dict({"image": images, "label": ["a", "b"]}).to_parquet(folder / f"{form}.parquet")
        assert load_images(str(folder / f"{form}.parquet")).train[1]["image"].size == (20, 30)


def test_a_saved_data_set(tmp_path, picture):
    rows = {"image": [picture()] * 4, "label": ["a", "b"] * 2}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows), extra=datasets.Dataset.from_dict(rows)).save_to_disk(
        tmp_path / "d"
    )
    data = load_images(str(tmp_path / "d"))
    assert (list(data.splits), data.notes) == (["train"], ["splits that are not read: extra"])


def test_what_is_no_table(tmp_path):
    (tmp_path / "t.csv").write_text("file_name,label\nx.png\n")
    (tmp_path / "empty.csv").write_text("file_name,label\n")
    (tmp_path / "x.txt").write_text("x")
    for name, message in (
        ("t.csv", "row 1 has 1 cells, the header has 2."),
        ("empty.csv", "has no rows"),
        ("x.txt", "is not a table"),
        ("nowhere.csv", "there is no such file or folder"),
    ):
        with pytest.raises(DatasetError, match=message):
            load_images(str(tmp_path / name))


def test_images_without_labels(put):
    folder = put("a/b", "c")
    path = write(folder / "t.csv", ["image", "id"], [("c/0.png", 7), ("c/1.png", 8)])
    assert len(load_unlabelled([str(folder)])) == 6
    assert load_unlabelled([str(folder / "c" / "0.png"), str(folder / "a")]).num_rows == 4
    assert load_unlabelled([path])[:]["id"] == ["7", "8"]
    put("s/train/x", "s/test/x")
    assert len(load_unlabelled([str(folder / "s")], split="test")) == 3
    with pytest.raises(DatasetError, match=r"there is no file `nowhere.png`"):
        load_unlabelled(["nowhere.png"])


def test_rows_to_predict_stay_in_their_order(put):
    folder = put("c")
    rows = [("c/0.png", 7, "test"), ("c/1.png", 8, "train"), ("c/2.png", 9, "val")]
    path = write(folder / "t.csv", ["image", "id", "split"], rows)
    assert load_unlabelled([path])[:]["id"] == ["7", "8", "9"]
    assert load_unlabelled([path], split="train")[:]["id"] == ["8"]


def test_a_folder_of_rows_without_image_files(tmp_path, picture):
    rows = datasets.Dataset.from_dict({"image": [picture(), picture()], "id": [0, 1]})
    (tmp_path / "tables").mkdir()
    rows.to_parquet(tmp_path / "tables" / "train.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=rows, train=rows).save_to_disk(tmp_path / "splits")
    for name, count in (("tables", 2), ("saved", 2), ("splits", 4)):
        found = load_unlabelled([str(tmp_path / name)])
        assert (len(found), found[0]["image"].size) == (count, (20, 30))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="there are no images in"):
        load_unlabelled([str(tmp_path / "empty")])
