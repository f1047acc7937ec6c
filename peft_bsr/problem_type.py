"""What a model's labels are, by transformers' names (`config.problem_type`), and by the words of `--task`."""

from __future__ import annotations

from typing import Literal

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE_LABEL: ProblemType = "single_label_classification"
MULTI_LABEL: ProblemType = "multi_label_classification"
REGRESSION: ProblemType = "regression"

TASKS: dict[str, ProblemType] = {
    "classification": SINGLE_LABEL,
    "multilabel": MULTI_LABEL,
    "regression": REGRESSION,
}
"""Word of `--task` -> problem type."""

__all__ = ["MULTI_LABEL", "REGRESSION", "SINGLE_LABEL", "TASKS", "ProblemType"]
