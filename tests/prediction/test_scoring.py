"""Figures by class, against what they are by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_bsr.prediction.scoring import ClassScore, LabelScore, ValueScore

NAMES = ["cat", "dog", "fox"]
ROWS = [{"image": f"{number}.png"} for number in range(4)]
# answers cat, cat, dog, cat; right are cat, cat, cat, dog; there is no fox
LOGITS = torch.tensor([[3.0, 1, 2], [3, 2, 1], [1, 3, 2], [3, 1, 2]])
SCORE = ClassScore(LOGITS, np.array([0, 0, 0, 1]), NAMES, ROWS, 1.0)


def test_by_class():
    assert SCORE.by_class() == {
        "cat": {
            "precision": pytest.approx(2 / 3),
            "recall": pytest.approx(2 / 3),
            "f1": pytest.approx(2 / 3),
            "images": 3,
        },
        "dog": {"precision": 0, "recall": 0, "f1": 0, "images": 1},
    }


def test_of_all():
    assert SCORE.accuracy == 0.5
    assert SCORE.balanced_accuracy() == pytest.approx((2 / 3 + 0) / 2)
    assert SCORE.top_accuracy(2) == 0.5  # the third image's cat and the fourth's dog come last
    assert SCORE.top_accuracy(9) == 1
    assert SCORE.confusion() == [[2, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert list(SCORE.figures()) == ["accuracy", "balanced_accuracy", "loss"]


def test_the_worst_images_come_first():
    chances = LOGITS.softmax(-1)
    found = SCORE.worst(3)
    assert [one["file"] for one in found] == ["2.png", "3.png", "0.png"]  # 0 and 1 are right, and alike
    first = {"row": 2, "file": "2.png", "label": "cat", "answer": "dog"}
    assert first.items() <= found[0].items()
    assert found[0]["probability"] == pytest.approx(float(chances[2, 1]))
    assert found[0]["loss"] == pytest.approx(float(-chances[2, 0].log()))
    assert SCORE.loss == pytest.approx(
        float(-(2 * chances[0, 0].log() + chances[2, 0].log() + chances[3, 1].log()) / 4)
    )


def test_tables_of_many_classes_show_the_worst():
    labels = np.arange(200)
    answers = labels.copy()
    answers[[7, 9]] = 8  # 7 and 9 are taken for 8
    names = [f"class {number}" for number in labels]
    found = ClassScore(torch.eye(200)[answers], labels, names, [{"image": "a.png"}] * 200, 1.0)
    classes, pairs = found.tables()
    assert classes.title == "By class, the 20 with the lowest F1 of 200"
    assert [row[0] for row in classes.rows[:3]] == ["class 7", "class 9", "class 8"]
    assert [tuple(row) for row in pairs.rows] == [("class 7", "class 8", "1"), ("class 9", "class 8", "1")]
    assert found.figures()["top5_accuracy"] >= found.figures()["accuracy"] == 0.99


def test_several_labels():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]], np.float32)  # no image has the third
    logits = torch.tensor([[2.0, -1, -3], [1, -2, 1], [-1, 1, -3], [-0.5, -1, -3]])
    found = LabelScore(logits, labels, NAMES, ROWS, 1.0)
    # answers: cat; cat, fox; dog; none
    assert found.by_label() == {
        "cat": {"precision": 1, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "images": 3}
        | {"average_precision": 1},
        "dog": {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "images": 2}
        | {"average_precision": pytest.approx((1 + 2 / 4) / 2)},
    }
    loss = -torch.where(torch.from_numpy(labels) > 0, logits.sigmoid().log(), (-logits).sigmoid().log()).mean()
    figures = {"f1_micro": 2 * 3 / (4 + 5), "f1_macro": (0.8 + 2 / 3) / 2, "mAP": (1 + 0.75) / 2, "loss": float(loss)}
    assert found.figures() == pytest.approx(figures)
    assert found.worst(1)[0] | {"loss": 0} == {
        "row": 1, "file": "1.png", "label": "cat, dog", "answer": "cat, fox", "loss": 0
    }  # fmt: skip
    assert found.tables()[0].rows[0][0] == "dog"
    nothing = LabelScore(logits, np.zeros_like(labels), NAMES, ROWS, 1.0).figures()
    assert (nothing["f1_micro"], nothing["f1_macro"], nothing["mAP"]) == (0, 0, 0)


def test_values():
    labels, values = np.array([[1, 10], [3, 30]], np.float32), torch.tensor([[2.0, 10], [3, 26]])
    found = ValueScore(values, labels, ["a", "b"], ROWS[:2], 1.0)
    assert found.figures() == pytest.approx(
        {"mae": 5 / 4, "rmse": (0.5**0.5 + 8**0.5) / 2, "r2": (0.5 + 0.92) / 2, "loss": 17 / 4}
    )
    assert found.by_value()["b"] == pytest.approx({"mae": 2, "rmse": 8**0.5, "r2": 0.92})
    assert found.worst(1)[0] == {"row": 1, "file": "1.png", "label": "3, 30", "answer": "3, 26", "loss": 8}
    assert [row[0] for row in found.tables()[0].rows] == ["a", "b"]
    one = ValueScore(values[:1, :1], labels[:1, :1], ["a"], ROWS[:1], 1.0)
    assert (one.figures(), one.tables()) == ({"mae": 1, "rmse": 1, "loss": 1}, [])
