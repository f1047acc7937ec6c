"""What Trainer is told of predictions: figures of classes, of several labels an image, and of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peft_bsr.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

BEST_BY = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "f1_micro", REGRESSION: "loss"}
"""Problem type -> by what the best epoch is found; all but a loss are the better the higher they are."""


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Share of right answers, for Trainer's `compute_metrics`."""
    return {"accuracy": float((_outputs(prediction).argmax(-1) == prediction.label_ids).mean())}


def compute_metrics_of(
    problem_type: ProblemType, restore: Callable[[np.ndarray], np.ndarray] = lambda values: values
) -> Callable[[Any], dict[str, float]]:
    """Trainer's `compute_metrics` of a problem type.

    Args:
        problem_type: One class an image: `accuracy`. Several labels: see `label_figures`. A regression: see
            `value_figures`.
        restore: Of a regression: makes values of what the model trains on, see `TargetScale.restore`. Default: they are
            the same.
    """
    if problem_type == SINGLE_LABEL:
        return compute_accuracy
    if problem_type == MULTI_LABEL:
        return lambda prediction: label_figures(_outputs(prediction), prediction.label_ids)
    return lambda prediction: value_figures(restore(_outputs(prediction)), restore(prediction.label_ids))


def label_figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Figures of several labels an image.

    Args:
        logits: [N, C]. A label is given from 0 on, which is a probability of 0.5.
        labels: [N, C] of 0 and 1.

    Returns:
        `f1_micro`, of all answers together; `f1_macro`, the mean over labels; `mAP`, the mean over labels of their
        average precision, which needs no threshold. Both means are of the labels that images here have, 0 without any.
    """
    each = [one for one in figures_by_label(logits, labels) if one["images"]]
    means = {key: float(np.mean([one[key] for one in each])) if each else 0.0 for key in ("average_precision", "f1")}
    return {"f1_micro": _micro_f1(logits >= 0, labels > 0), "f1_macro": means["f1"], "mAP": means["average_precision"]}


def figures_by_label(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """Figures of each of C labels: `precision`, `recall`, `f1`, `images` with it, `average_precision`.

    They are 0 where there is nothing to divide by.

    Args:
        logits: [N, C].
        labels: [N, C] of 0 and 1.
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
    """Figures of a regression: means over its values.

    Args:
        values: [N, C] answers.
        labels: [N, C] what is right.

    Returns:
        `mae`, the mean absolute error; `rmse`, the root of the mean squared error; of two images or more `r2`, the
        share of the variance that is explained.
    """
    from sklearn.metrics import r2_score

    errors = values.astype(np.float64) - labels
    figures = {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt(np.square(errors).mean(axis=0)).mean())}
    return figures | ({"r2": float(r2_score(labels, values))} if len(labels) > 1 else {})


def _micro_f1(answers: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels.ravel(), answers.ravel(), zero_division=0.0))  # of one label sklearn takes no average


def _outputs(prediction: Any) -> np.ndarray:
    found = prediction.predictions
    outputs: np.ndarray = found[0] if isinstance(found, tuple) else found  # some models give more than logits
    return outputs


__all__ = ["BEST_BY", "compute_accuracy", "compute_metrics_of", "figures_by_label", "label_figures", "value_figures"]
