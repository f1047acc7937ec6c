"""Evaluation on labelled images: one function for `evaluate`, `train` and the model card."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from peft_bsr.data import labels_of
from peft_bsr.errors import DatasetError
from peft_bsr.prediction.images import Rows, outputs_of, read_rows, row_name
from peft_bsr.prediction.predictor import Predictor
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from peft_bsr.training.scores import figures_by_label, label_figures, value_figures

if TYPE_CHECKING:
    from datasets import Dataset

_KEYS, _SHOWN, _PAIRS, _WORST = ("precision", "recall", "f1", "images"), 20, 10, 20

Details = dict[str, Any]  # results for JSON, see each score


class _Texts(TypedDict):
    label: str
    answer: str


class Answer(_Texts, total=False):
    """True label and predicted answer of an image, and with one class per image its probability."""

    probability: float


class WorstImage(Answer):
    """An image with a high loss."""

    row: int
    file: str
    loss: float


class Table(NamedTuple):
    """A table to print.

    Attributes:
        title: Title.
        columns: Column headings.
        rows: Cells of each row.
        left: Indices of columns that are aligned left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)


@dataclass(frozen=True)
class Score(ABC):
    """A model's outputs on labelled images, with metrics. Subclasses hide the kind of labels.

    Attributes:
        logits: [N, C].
        labels: The true labels: class indices [N], 0 and 1 [N, C], or values [N, C].
        names: Names of the C classes or values, by index.
        rows: The images, `{"image": ...}` each.
        images_per_second: Speed, including reading the images.
    """

    logits: Tensor
    labels: np.ndarray
    names: Sequence[str]
    rows: Rows
    images_per_second: float

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Name -> metric over all images; the first one is the main metric, the last is `loss`."""

    @abstractmethod
    def details(self) -> Details:
        """Further results for JSON, including the `worst` images."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """Tables to print."""

    @property
    @abstractmethod
    def losses(self) -> Tensor:
        """Loss of each image, [N]."""

    @property
    def loss(self) -> float:
        """Mean of `losses`."""
        return float(self.losses.mean())

    @abstractmethod
    def said(self, index: int) -> Answer:
        """True `label` and predicted `answer` of an image as text.

        Args:
            index: Index of the image.
        """

    def worst(self, count: int = _WORST) -> list[WorstImage]:
        """Images with the highest loss: `row`, `file`, `label`, `answer`, `loss`, highest first.

        Args:
            count: Maximum number of images. Default 20.
        """
        losses = self.losses
        return [
            {
                "row": index,
                "file": row_name(self.rows, index),
                **self.said(index),
                "loss": float(losses[index]),
            }
            for index in losses.argsort(descending=True, stable=True)[:count].tolist()
        ]


@dataclass(frozen=True)
class ClassScore(Score):
    """Score of a model with one class per image; `labels` are class indices [N]."""

    def figures(self) -> dict[str, float]:
        """`accuracy` (the main metric), `balanced_accuracy`, `top5_accuracy` with more than 5 classes, `loss`."""
        top5 = {"top5_accuracy": self.top_accuracy(5)} if len(self.names) > 5 else {}
        return {"accuracy": self.accuracy, "balanced_accuracy": self.balanced_accuracy(), **top5, "loss": self.loss}

    def details(self) -> Details:
        """For JSON: `classes` (metrics of each), `labels`, `confusion` in the order of `labels`, `worst` images."""
        return {
            "classes": self.by_class(),
            "labels": list(self.names),
            "confusion": self.confusion(),
            "worst": self.worst(),
        }

    def tables(self) -> list[Table]:
        """Classes with their metrics, the lowest F1 first; pairs of classes that were confused."""
        tables = [class_table(self.by_class())]
        if pairs := self.confused():
            texts = [(label, answer, str(count)) for label, answer, count in pairs]
            tables.append(Table("Most often confused", ("class", "taken for", "images"), texts, (0, 1)))
        return tables

    @property
    def answers(self) -> np.ndarray:
        """The most probable classes, [N]."""
        found: np.ndarray = self.logits.argmax(-1).numpy()
        return found

    @property
    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float((self.answers == self.labels).mean())

    @property
    def losses(self) -> Tensor:
        """[N], cross-entropy of each image."""
        return cross_entropy(self.logits, torch.from_numpy(self.labels), reduction="none")

    def top_accuracy(self, k: int) -> float:
        """Share of images whose class is among the k most probable ones."""
        best = self.logits.topk(min(k, self.logits.shape[1]), dim=-1).indices.numpy()
        return float((best == self.labels[:, None]).any(axis=1).mean())

    def by_class(self) -> dict[str, dict[str, float]]:
        """Class -> `precision`, `recall`, `f1` (0 for a division by zero), `images`; only classes with images."""
        from sklearn.metrics import precision_recall_fscore_support

        there = np.unique(self.labels)
        columns = precision_recall_fscore_support(self.labels, self.answers, labels=there, zero_division=0.0)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return {self.names[label]: dict(zip(_KEYS, row, strict=True)) for label, row in zip(there, rows, strict=True)}

    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that have images."""
        from sklearn.metrics import recall_score

        return float(recall_score(self.labels, self.answers, labels=np.unique(self.labels), average="macro"))

    def confusion(self) -> list[list[int]]:
        """[C][C], number of images of the row's class that were predicted as the column's class."""
        from sklearn.metrics import confusion_matrix

        counts: list[list[int]] = confusion_matrix(self.labels, self.answers, labels=range(len(self.names))).tolist()
        return counts

    def confused(self, count: int = _PAIRS) -> list[tuple[str, str, int]]:
        """Class, the predicted other class, and number of images, the most frequent pairs first.

        Args:
            count: Maximum number of pairs. Default 10.
        """
        pairs = Counter(zip(self.labels.tolist(), self.answers.tolist(), strict=True))
        wrong = [(label, answer, images) for (label, answer), images in pairs.items() if label != answer]
        first = sorted(wrong, key=lambda one: (-one[2], *one[:2]))[:count]
        return [(self.names[label], self.names[answer], images) for label, answer, images in first]

    def said(self, index: int) -> Answer:
        """`label`, `answer`, and its `probability`."""
        answer = self.answers[index]
        chance = float(self.logits[index].softmax(-1)[answer])
        return {"label": self.names[self.labels[index]], "answer": self.names[answer], "probability": chance}


@dataclass(frozen=True)
class LabelScore(Score):
    """Score of a model with several labels per image; `labels` are 0 and 1 [N, C]. A label is predicted from 0.5 on."""

    def figures(self) -> dict[str, float]:
        """`f1_micro` (the main metric), `f1_macro`, `mAP`, see `label_figures`; `loss`."""
        return {**label_figures(self.logits.numpy(), self.labels), "loss": self.loss}

    def details(self) -> Details:
        """For JSON: `classes` (metrics of each label), `labels`, `worst` images."""
        return {"classes": self.by_label(), "labels": list(self.names), "worst": self.worst()}

    def tables(self) -> list[Table]:
        """Labels with their metrics, the lowest F1 first."""
        return [class_table(self.by_label())]

    @property
    def losses(self) -> Tensor:
        """[N], mean binary cross-entropy over the labels."""
        losses = binary_cross_entropy_with_logits(self.logits, torch.from_numpy(self.labels), reduction="none")
        return losses.mean(-1)

    def by_label(self) -> dict[str, dict[str, float]]:
        """Label -> `precision`, `recall`, `f1`, `images` with it, `average_precision`; only labels that occur."""
        each = zip(self.names, figures_by_label(self.logits.numpy(), self.labels), strict=True)
        return {name: own for name, own in each if own["images"]}

    def said(self, index: int) -> Answer:
        """`label` and `answer`, names separated by commas."""
        both = (self.labels[index] > 0, (self.logits[index] >= 0).numpy())
        names = [", ".join(name for name, is_there in zip(self.names, one, strict=True) if is_there) for one in both]
        return {"label": names[0] or "none", "answer": names[1] or "none"}


@dataclass(frozen=True)
class ValueScore(Score):
    """Score of a regression; `labels` and `logits` are values [N, C]."""

    def figures(self) -> dict[str, float]:
        """`mae` (the main metric), `rmse`, `r2`, see `value_figures`; `loss`."""
        return {**value_figures(self.logits.numpy(), self.labels), "loss": self.loss}

    def details(self) -> Details:
        """For JSON: `values` (metrics of each), `labels` (their names), `worst` images."""
        return {"values": self.by_value(), "labels": list(self.names), "worst": self.worst()}

    def tables(self) -> list[Table]:
        """Metrics of each value, if there are several."""
        if len(self.names) == 1:
            return []
        rows = [(name, *(f"{figure:.4g}" for figure in own.values())) for name, own in self.by_value().items()]
        return [Table("By value", ("value", "MAE", "RMSE", "R2")[: len(rows[0])], rows)]

    @property
    def losses(self) -> Tensor:
        """[N], mean squared error over the values."""
        return mse_loss(self.logits, torch.from_numpy(self.labels), reduction="none").mean(-1)

    def by_value(self) -> dict[str, dict[str, float]]:
        """Value -> its `mae`, `rmse` and, with at least two images, `r2`."""
        columns = zip(self.names, self.logits.numpy().T, self.labels.T, strict=True)
        return {name: value_figures(found[:, None], right[:, None]) for name, found, right in columns}

    def said(self, index: int) -> Answer:
        """`label` and `answer`, numbers separated by commas."""
        both = (self.labels[index].tolist(), self.logits[index].tolist())
        label, answer = (", ".join(f"{value:.4g}" for value in one) for one in both)
        return {"label": label, "answer": answer}


def class_table(classes: dict[str, dict[str, float]]) -> Table:
    """Classes with their metrics, the lowest F1 first.

    Args:
        classes: Class -> `precision`, `recall`, `f1`, `images`.
    """
    worst = sorted(classes.items(), key=lambda item: item[1]["f1"])[:_SHOWN]
    rows = [(name, *(f"{own[key]:.3f}" for key in _KEYS[:3]), f"{own['images']:.0f}") for name, own in worst]
    title = "By class" if len(classes) <= _SHOWN else f"By class, the {_SHOWN} with the lowest F1 of {len(classes)}"
    return Table(title, ("class", "precision", "recall", "F1", "images"), rows)


def score(
    predictor: Predictor, images: Dataset, *, batch_size: int = 32, workers: int | None = None, progress: bool = True
) -> Score:
    """Evaluate a model on labelled images.

    Args:
        predictor: The model.
        images: A `datasets.Dataset` with the columns `image` and `label`, see `peft_bsr.data.LabelledImages`.
        batch_size: Images per forward.
        workers: See `outputs_of`.
        progress: Whether to show a progress bar.

    Raises:
        DatasetError: If an image cannot be read.
    """
    begin = time.perf_counter()
    logits: list[Tensor] = []
    rows = read_rows(images)
    for one in outputs_of(predictor, rows, batch_size=batch_size, workers=workers, progress=progress):
        if isinstance(one, str):
            raise DatasetError(f"image {len(logits)}: {one}.")
        logits.append(one)
    seconds = time.perf_counter() - begin
    kind = _KINDS[predictor.problem_type]
    return kind(torch.stack(logits), labels_of(images), predictor.labels, rows, len(logits) / seconds)


_KINDS: dict[str, type[Score]] = {SINGLE_LABEL: ClassScore, MULTI_LABEL: LabelScore, REGRESSION: ValueScore}


__all__ = ["ClassScore", "LabelScore", "Score", "Table", "ValueScore", "score"]
