"""Accuracy and loss of what a model answers on labelled images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peft_bsr.data import labels_of
from peft_bsr.errors import DatasetError, UsageError
from peft_bsr.prediction.answers import SINGLE_LABEL
from peft_bsr.prediction.images import outputs_of, read_rows
from peft_bsr.prediction.predictor import Predictor


@dataclass(frozen=True)
class Score:
    """What a model answered on labelled images.

    Attributes:
        logits: [N, C].
        labels: [N], the right classes.
        images_per_second: Reading them included.
    """

    logits: Tensor
    labels: np.ndarray
    images_per_second: float

    @property
    def answers(self) -> np.ndarray:
        """[N], the most probable classes."""
        found: np.ndarray = self.logits.argmax(-1).numpy()
        return found

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float((self.answers == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(cross_entropy(self.logits, torch.from_numpy(self.labels)))

    def top_accuracy(self, k: int) -> float:
        """Share of images whose class is among the k most probable ones."""
        best = self.logits.topk(min(k, self.logits.shape[1]), dim=-1).indices.numpy()
        return float((best == self.labels[:, None]).any(axis=1).mean())

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Class -> `precision`, `recall`, `f1` (0 where there is nothing to divide by), `images`.

        Args:
            names: All classes of the model, by number. Those without images here are left out.
        """
        from sklearn.metrics import precision_recall_fscore_support

        there = np.unique(self.labels)
        columns = precision_recall_fscore_support(self.labels, self.answers, labels=there, zero_division=0.0)
        keys = ("precision", "recall", "f1", "images")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return {names[label]: dict(zip(keys, row, strict=True)) for label, row in zip(there, rows, strict=True)}

    def balanced_accuracy(self) -> float:
        """Mean over the classes that have images of their share of right answers."""
        from sklearn.metrics import recall_score

        return float(recall_score(self.labels, self.answers, labels=np.unique(self.labels), average="macro"))

    def confusion(self) -> list[list[int]]:
        """[C][C], images of the class of the row that were taken for the class of the column."""
        from sklearn.metrics import confusion_matrix

        counts: list[list[int]] = confusion_matrix(
            self.labels, self.answers, labels=range(self.logits.shape[1])
        ).tolist()
        return counts


def check_scorable(predictor: Predictor) -> None:
    """Refuse models whose answers are not one class an image.

    Raises:
        UsageError: Naming what it is.
    """
    if predictor.problem_type != SINGLE_LABEL:
        kind = predictor.problem_type.replace("_", " ")
        raise UsageError(f"`{predictor.name}` is a model for {kind}: accuracy is of models with one class an image.")


def score(
    predictor: Predictor, images: Any, *, batch_size: int = 32, workers: int | None = None, progress: bool = True
) -> Score:
    """Let a model answer on labelled images.

    Args:
        predictor: With one class an image.
        images: A `datasets.Dataset` with the columns `image` and `label`, the number of the class in the model.
        batch_size: Images a call.
        workers: See `outputs_of`.
        progress: Whether to show a bar.

    Raises:
        DatasetError: If an image cannot be read.
        UsageError: See `check_scorable`.
    """
    check_scorable(predictor)
    begin = time.perf_counter()
    logits: list[Tensor] = []
    for one in outputs_of(predictor, read_rows(images), batch_size=batch_size, workers=workers, progress=progress):
        if isinstance(one, str):
            raise DatasetError(f"image {len(logits)}: {one}.")
        logits.append(one)
    seconds = time.perf_counter() - begin
    return Score(torch.stack(logits), labels_of(images), len(logits) / seconds)


__all__ = ["Score", "check_scorable", "score"]
