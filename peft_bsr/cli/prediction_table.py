"""Predictions as rows of a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft_bsr.prediction import Prediction, Predictor
from peft_bsr.prediction.answers import THRESHOLD
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION


@dataclass(frozen=True)
class PredictionTable:
    """Columns and rows of predictions.

    `file, label, probability`, and for more classes `label_2, probability_2, ...`; with all classes
    `probability_<class>` of each. Several labels of an image are one cell, `cat|dog`: those from
    the threshold on. For a regression `file, value`, or `value_<name>` of each.

    Attributes:
        predictor: Predictor of the predictions.
        top_k: See `to_prediction`: None for all.
        threshold: See `to_prediction`. Default 0.5.
    """

    predictor: Predictor
    top_k: int | None
    threshold: float = THRESHOLD

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        labels = self.predictor.labels
        if self.predictor.problem_type == REGRESSION:
            return ["file", *(["value"] if len(labels) == 1 else [f"value_{label}" for label in labels])]
        header = ["file", "label", "probability"]
        if self.top_k is None:
            return header + [f"probability_{label}" for label in labels]
        for number in range(2, min(self.top_k, len(labels)) + 1):
            header += [f"label_{number}", f"probability_{number}"]
        return header

    def predicted(self, one: Prediction) -> tuple[str, ...]:
        """The most probable class; of several labels those from the threshold on, the most probable first.

        Args:
            one: Prediction of classes, without an error.
        """
        if self.predictor.problem_type != MULTI_LABEL:
            return one.labels[:1]
        return one.labels[: sum(chance >= self.threshold for chance in one.probabilities)]

    def row(self, one: Prediction) -> list[str]:
        """Row of a prediction; numbers have six digits.

        Args:
            one: Prediction without an error.
        """
        if self.predictor.problem_type == REGRESSION:
            return [one.file, *map(_number, one.values)]
        chances = list(map(_number, one.probabilities))
        if self.predictor.problem_type == MULTI_LABEL or self.top_k is None:
            labels = self.predicted(one)
            cells = ["|".join(labels), "|".join(chances[: len(labels)])]
        else:
            cells = [cell for pair in zip(one.labels, chances, strict=True) for cell in pair]
        if self.top_k is None:
            by_class = dict(zip(one.classes, chances, strict=True))
            cells += [by_class[c] for c in sorted(by_class)]
        return [one.file, *cells]


@contextmanager
def write_csv(path: Path | None, header: Sequence[str]) -> Iterator[Callable[[Sequence[object]], object]]:
    """Context manager: a function that writes a row. The file appears when all rows are written, and not on an error.

    Args:
        path: File to write, or None to write nothing.
        header: First row.
    """
    if path is None:
        yield lambda row: None
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            yield writer.writerow
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _number(value: float) -> str:
    return f"{value:.6g}"


__all__ = ["PredictionTable", "write_csv"]
