"""What a model answers on labelled images, in figures: one function for `evaluate`, for `train` and for its card."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from peft_bsr.data import labels_of
from peft_bsr.errors import DatasetError, UsageError
from peft_bsr.prediction.answers import SINGLE_LABEL
from peft_bsr.prediction.images import Rows, outputs_of, read_rows, row_name
from peft_bsr.prediction.predictor import Predictor

_KEYS, _SHOWN, _PAIRS, _WORST = ("precision", "recall", "f1", "images"), 20, 10, 20


class Table(NamedTuple):
    """A table for people.

    Attributes:
        title: Above.
        columns: Headings.
        rows: As many texts each.
        left: Indices of columns that are aligned left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)


@dataclass(frozen=True)
class Score:
    """What a model with one class an image answered on labelled images.

    A model of another kind has figures, details and tables of its own; whoever shows them does not ask which.

    Attributes:
        logits: [N, C].
        labels: [N], the right classes.
        names: Of the C classes, by number.
        rows: The images, `{"image": ...}` each.
        images_per_second: Reading them included.
    """

    logits: Tensor
    labels: np.ndarray
    names: Sequence[str]
    rows: Rows
    images_per_second: float

    def figures(self) -> dict[str, float]:
        """`accuracy` (the one that sums it up), `balanced_accuracy`, `top5_accuracy` of more than 5 classes, `loss`."""
        top5 = {"top5_accuracy": self.top_accuracy(5)} if len(self.names) > 5 else {}
        return {"accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy(), **top5, "loss": self.loss}

    def details(self) -> dict[str, Any]:
        """For JSON: `classes` (figures of each), `labels`, `confusion` in the order of `labels`, `worst` images."""
        return {
            "classes": self.by_class(),
            "labels": list(self.names),
            "confusion": self.confusion(),
            "worst": self.worst(),
        }

    def tables(self) -> list[Table]:
        """Classes with their figures, the lowest F1 first; pairs of classes that were taken for each other."""
        classes = self.by_class()
        worst = sorted(classes.items(), key=lambda item: item[1]["f1"])[:_SHOWN]
        rows = [(name, *(f"{own[key]:.3f}" for key in _KEYS[:3]), f"{own['images']:.0f}") for name, own in worst]
        title = "By class" if len(classes) <= _SHOWN else f"By class, the {_SHOWN} with the lowest F1 of {len(classes)}"
        tables = [Table(title, ("class", "precision", "recall", "F1", "images"), rows)]
        if pairs := self.confused():
            texts = [(label, answer, str(count)) for label, answer, count in pairs]
            tables.append(Table("Most often confused", ("class", "taken for", "images"), texts, (0, 1)))
        return tables

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
    def losses(self) -> Tensor:
        """[N], cross-entropy of each image."""
        return cross_entropy(self.logits, torch.from_numpy(self.labels), reduction="none")

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.losses.mean())

    def top_accuracy(self, k: int) -> float:
        """Share of images whose class is among the k most probable ones."""
        best = self.logits.topk(min(k, self.logits.shape[1]), dim=-1).indices.numpy()
        return float((best == self.labels[:, None]).any(axis=1).mean())

    def by_class(self) -> dict[str, dict[str, float]]:
        """Class -> `precision`, `recall`, `f1` (0 where there is nothing to divide by), `images`; those with images."""
        from sklearn.metrics import precision_recall_fscore_support

        there = np.unique(self.labels)
        columns = precision_recall_fscore_support(self.labels, self.answers, labels=there, zero_division=0.0)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return {self.names[label]: dict(zip(_KEYS, row, strict=True)) for label, row in zip(there, rows, strict=True)}

    def balanced_accuracy(self) -> float:
        """Mean over the classes that have images of their share of right answers."""
        from sklearn.metrics import recall_score

        return float(recall_score(self.labels, self.answers, labels=np.unique(self.labels), average="macro"))

    def confusion(self) -> list[list[int]]:
        """[C][C], images of the class of the row that were taken for the class of the column."""
        from sklearn.metrics import confusion_matrix

        counts: list[list[int]] = confusion_matrix(self.labels, self.answers, labels=range(len(self.names))).tolist()
        return counts

    def confused(self, count: int = _PAIRS) -> list[tuple[str, str, int]]:
        """Class, the other class that it was taken for, and images, the most images first.

        Args:
            count: Pairs at most. Default 10.
        """
        wrong = np.array(self.confusion())
        np.fill_diagonal(wrong, 0)
        first = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [(row, column) for row, column in zip(*np.unravel_index(first, wrong.shape), strict=True)]
        return [(self.names[r], self.names[c], int(wrong[r, c])) for r, c in pairs if wrong[r, c]]

    def worst(self, count: int = _WORST) -> list[dict[str, Any]]:
        """Images with the highest loss: `row`, `file`, `label`, `answer`, its `probability`, and `loss`, highest first.

        Args:
            count: Images at most. Default 20.
        """
        losses, chances, answers = self.losses, self.logits.softmax(-1), self.answers
        return [
            {
                "row": index,
                "file": row_name(self.rows, index),
                "label": self.names[self.labels[index]],
                "answer": self.names[answers[index]],
                "probability": float(chances[index, answers[index]]),
                "loss": float(losses[index]),
            }
            for index in losses.argsort(descending=True, stable=True)[:count].tolist()
        ]


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
    rows = read_rows(images)
    for one in outputs_of(predictor, rows, batch_size=batch_size, workers=workers, progress=progress):
        if isinstance(one, str):
            raise DatasetError(f"image {len(logits)}: {one}.")
        logits.append(one)
    seconds = time.perf_counter() - begin
    return Score(torch.stack(logits), labels_of(images), predictor.labels, rows, len(logits) / seconds)


__all__ = ["Score", "Table", "check_scorable", "score"]
