"""Several labels an image, and values: which columns are meant, how cells are read, what is refused."""

from __future__ import annotations

import csv
import json

import datasets
import numpy as np
import pytest

from peft_bsr import DatasetError
from peft_bsr.data import check_images, labels_of, load_images, put_aside
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL


@pytest.fixture
def table(put):
    """`table({"tags": ["a|b", ""]})`: a CSV file with an image for each row; `ending="jsonl"` for another file."""

    def make(columns, ending="csv"):
        count = len(next(iter(columns.values())))
        folder = put("i", n=count)
        rows = [{"image": f"i/{i}.png", **{name: column[i] for name, column in columns.items()}} for i in range(count)]
        with (folder / f"t.{ending}").open("w", encoding="utf-8", newline="") as file:
            if ending == "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
        return str(folder / f"t.{ending}")

    return make


def read(path, **options):
    """Problem type, names, and vectors as lists."""
    data = load_images(path, **options)
    return data.problem_type, data.labels, labels_of(data.train).tolist()


SETS = {
    "bars": ({"tags": ["b|a", "a", "", "b | b |"]}, {}),
    "commas, asked for": ({"tags": ["b,a", "a", "", "b"]}, {"problem_type": MULTI_LABEL, "label_column": "tags"}),
    "columns of 0 and 1": ({"a": [1, 1, 0, 0], "b": ["true", "0", "0.0", "1"]}, {"label_column": "a, b"}),
}


@pytest.mark.parametrize(("columns", "options"), SETS.values(), ids=SETS)
def test_several_labels_of_text(table, columns, options):
    found = read(table(columns), **options)
    assert found == (MULTI_LABEL, ["a", "b"], [[1, 1], [1, 0], [0, 0], [0, 1]])


def test_lists(table, put, picture):
    path = table({"tags": [["b", "a"], ["a"], [], None]}, "jsonl")
    assert read(path) == (MULTI_LABEL, ["a", "b"], [[1, 1], [1, 0], [0, 0]])
    notes = load_images(path).notes
    assert "train: 1 of 4 images have none of the labels" in notes
    assert "train: 1 of 4 rows have no label and are skipped" in notes
    assert "several labels per image, because the column `tags` holds lists (change it with `--task`)" in notes
    kinds = datasets.Features(
        {"image": datasets.Image(), "tags": datasets.Sequence(datasets.ClassLabel(names=["z", "a", "never"]))}
    )
    rows = {"image": [picture(), picture()], "tags": [[1], [0, 1]]}
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(put() / "l.parquet")
    assert read(str(put() / "l.parquet")) == (MULTI_LABEL, ["z", "a", "never"], [[0, 1, 0], [1, 1, 0]])


def test_values(table):
    columns = {"age": ["1.5", "2", "", "-1"], "mass": [1, 2, 3, 4]}
    assert read(table(columns), label_column="age") == (REGRESSION, ["age"], [[1.5], [2], [-1]])
    both = read(table(columns), label_column=["mass", "age"])
    assert both == (REGRESSION, ["mass", "age"], [[1, 1.5], [2, 2], [4, -1]])
    whole = {"label": [3, 1, 3, 2]}
    assert read(table(whole))[0] == SINGLE_LABEL
    assert read(table(whole), problem_type=REGRESSION) == (REGRESSION, ["label"], [[3], [1], [3], [2]])


def test_folders_called_by_numbers_may_be_values(put):
    folder = str(put("7", "31", n=1))
    assert load_images(folder).describe() == "2 classes: 7 (1), 31 (1)"
    assert load_images(folder, problem_type=REGRESSION).describe() == "regression, 1 value: label (7 to 31)"


def test_names_are_the_models(table):
    path = table({"b": [1, 0], "a": [0, 1], "age": ["x", "y"]})
    options = {"problem_type": MULTI_LABEL, "labels": ["a", "b"]}
    assert read(path, **options)[1:] == (["a", "b"], [[0, 1], [1, 0]])
    assert read(path, **options, label_column="b,a")[1:] == (["a", "b"], [[0, 1], [1, 0]])
    with pytest.raises(DatasetError, match="the model gives a, c, but the columns are b, a"):
        load_images(path, label_column="b,a", problem_type=MULTI_LABEL, labels=["a", "c"])
    texts = table({"tags": ["b", "b|c"]})
    assert read(texts, problem_type=MULTI_LABEL, labels=["c", "b", "a"])[2] == [[0, 1, 0], [1, 1, 0]]
    with pytest.raises(DatasetError, match="the model does not know 1 of the 2 classes: c"):
        load_images(texts, problem_type=MULTI_LABEL, labels=["a", "b"])
    renamed = read(table({"years": ["1.5", "2"]}), problem_type=REGRESSION, labels=["age"], label_column="years")
    assert renamed == (REGRESSION, ["age"], [[1.5], [2]])


REFUSED = [
    ({"a": [0, 1, 1], "b": [1, 1, 0], "c": [0, 0, 1]}, {}, "several columns may hold labels: a, b, c. Choose one"),
    ({"a": [0, 2], "b": [1, 1]}, {"label_column": "a,b"}, "one column per label; `a` holds `2`. If they are values"),
    ({"a": [0, 1], "b": [1, 1]}, {"label_column": "a,c"}, "`--label-column c`: there is no column of this name"),
    ({"a": [0, 1], "b": [1, 1]}, {"label_column": "a,a"}, "names a column twice"),
    ({"a": [0, 1], "b": [1, 1]}, {"label_column": "a,b", "problem_type": SINGLE_LABEL}, "one class per image there is"),
    ({"tags": ["a,b;c", "a"]}, {"label_column": "tags", "problem_type": MULTI_LABEL}, "separate labels with `|`"),
    ({"label": ["a", "3"]}, {"problem_type": REGRESSION, "label_column": "label"}, "`a`: a value must be a number"),
    ({"label": ["1e99", "3"]}, {"problem_type": REGRESSION, "label_column": "label"}, "`1e99`: a value must be a"),
    ({"label": [[0, 0, 1], [1, 0, 0]]}, {}, "row 0 has a label twice, [0, 0, 1]. Lists contain the labels"),
    ({"label": [[0.5], [1.5]]}, {}, "lists of float64: a label is a string or an integer"),
]


@pytest.mark.parametrize(("columns", "options", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_what_is_refused(table, columns, options, message):
    ending = "jsonl" if isinstance(next(iter(columns.values()))[0], list) else "csv"
    with pytest.raises(DatasetError) as raised:
        load_images(table(columns, ending), **options)
    assert message in str(raised.value)


def test_parts_are_drawn_from_all_images(table):
    for columns in ({"tags": ["a|b", "a"] * 10}, {"value": [i + 0.5 for i in range(20)]}):
        data = load_images(table(columns))
        first, second = put_aside(data), put_aside(data)
        assert {split: len(rows) for split, rows in first.splits.items()} == {"train": 14, "validation": 2, "test": 4}
        assert np.array_equal(labels_of(first.test), labels_of(second.test))
        assert "test: 4 of the 20 training images are held out, at random, not by label" in first.notes


def test_labels_that_are_all_alike(table):
    with pytest.raises(DatasetError, match="all 3 training images have the same labels"):
        put_aside(load_images(table({"tags": ["a|b"] * 3})))
    with pytest.raises(DatasetError, match=r"`value` is 0\.5 in all 3 training rows"):
        put_aside(load_images(table({"value": [0.5] * 3})))


def test_what_check_counts(table):
    report, _ = check_images(load_images(table({"tags": ["a|b", "a", ""]})), progress=False)
    assert (report.images, report.counts, report.few) == ({"train": 3}, {"train": {"a": 2, "b": 1}}, {"a": 2, "b": 1})
    report, _ = check_images(load_images(table({"value": [0.5, 1.5, 4]})), progress=False)
    assert (report.counts, report.few, report.unseen) == ({"train": {}}, {}, [])
    assert report.values["train"]["value"] == pytest.approx(
        {"least": 0.5, "median": 1.5, "largest": 4, "mean": 2, "deviation": np.std([0.5, 1.5, 4])}
    )
