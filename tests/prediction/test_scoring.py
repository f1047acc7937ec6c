"""Figures by class, against what they are by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_bsr.prediction.scoring import Score

NAMES = ["cat", "dog", "fox"]
# answers cat, cat, dog, cat; right are cat, cat, cat, dog; there is no fox
SCORE = Score(torch.tensor([[3.0, 1, 2], [3, 2, 1], [1, 3, 2], [3, 1, 2]]), np.array([0, 0, 0, 1]), 1.0)


def test_by_class():
    assert SCORE.by_class(NAMES) == {
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
