"""Metrics for Trainer: of classes, of several labels per image, and of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from peft_bsr.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from transformers import EvalPrediction

BEST_BY = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "f1_micro", REGRESSION: "loss"}
"""Problem type -> metric that selects the best epoch; higher is better, except for a loss."""


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, for Trainer's `compute_metrics`."""
    return {"accuracy": float((_outputs(prediction).argmax(-1) == prediction.label_ids).mean())}


def compute_metrics_of(
    problem_type: ProblemType, restore: Callable[[np.ndarray], np.ndarray] = lambda values: values
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's `compute_metrics` for a problem type.

    Args:
        problem_type: One class per image: `accuracy`. Several labels: see `label_figures`. A regression: see
            `value_figures`.
        restore: Function from scaled to original values, for a regression, see `TargetScale.restore`. Default: the
            identity.
    """
    if problem_type == SINGLE_LABEL:
        return compute_accuracy
    if problem_type == MULTI_LABEL:
        return lambda prediction: label_figures(_outputs(prediction), prediction.label_ids)
    return lambda prediction: value_figures(restore(_outputs(prediction)), restore(prediction.label_ids))


def label_figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics for several labels per image.

    Args:
        logits: [N, C]. A label is predicted from 0 on, a probability of 0.5.
        labels: 0 and 1 [N, C].

    Returns:
        `f1_micro`, over all predictions; `f1_macro`, the mean over labels; `mAP`, the mean average precision over
        labels, which needs no threshold. Both means are over the labels that occur, 0 if there are none.
    """
    each = [one for one in figures_by_label(logits, labels) if one["images"]]
    means = {key: float(np.mean([one[key] for one in each])) if each else 0.0 for key in ("average_precision", "f1")}
    return {"f1_micro": _micro_f1(logits >= 0, labels > 0), "f1_macro": means["f1"], "mAP": means["average_precision"]}


def figures_by_label(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Metrics of each of C labels: `precision`, `recall`, `f1`, `images` with it, `average_precision`.

    They are 0 for a division by zero.

    Args:
        logits: [N, C].
        labels: 0 and 1 [N, C].
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    found = []
    for scores, right in zip(logits.T, labels.T > 0, strict=True):
        three = precision_recall_fscore_support(right, scores >= 0, average="binary", zero_division=0.0)[:3]
        one = dict(zip(("precision", "recall", "f1"), map(float, three), strict=True))
        area = float(average_precision_score(right, scores)) if right.any() else 0.0
        found.append({**one, "images": int(right.sum()), "average_precision": area})
    return found


def value_figures(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of a regression, averaged over its values.

    Args:
        values: Predictions [N, C].
        labels: True values [N, C].

    Returns:
        `mae`, the mean absolute error; `rmse`, the root of the mean squared error; with at least two images `r2`, the
        coefficient of determination.
    """
    from sklearn.metrics import r2_score

    errors = values.astype(np.float64) - labels
    figures = {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt(np.square(errors).mean(axis=0)).mean())}
    return figures | ({"r2": float(r2_score(labels, values))} if len(labels) > 1 else {})


def _micro_f1(answers: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels.ravel(), answers.ravel(), zero_division=0.0))  # for one label sklearn needs no average


def _outputs(prediction: EvalPrediction) -> np.ndarray:
    found = prediction.predictions
    outputs: np.ndarray = found[0] if isinstance(found, tuple) else found  # some models return more than logits
    return outputs


__all__ = ["BEST_BY", "compute_accuracy", "compute_metrics_of", "figures_by_label", "label_figures", "value_figures"]
