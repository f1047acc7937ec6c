"""Metrics of tasks as `evaluate.Metric` classes that do not need the Hub.

`peft_bsr` does not import this module: it needs `evaluate` (`pip install 'peft-bsr[multitask]'`).
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from peft_bsr.multitask import IGNORED_CLASS, TaskConfig

_NUMBERS = datasets.Sequence(datasets.Value("float32"))
_CLASSES = datasets.Sequence(datasets.Value("int64"))


def _info(description: str, **features: datasets.Value | datasets.Sequence) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description="", features=datasets.Features(features)
    )


class TaskAccuracy(evaluate.Metric):
    """Accuracy of each task, and the unweighted mean over the tasks.

    Examples:
        >>> metric = TaskAccuracy()
        >>> metric.compute(predictions=[1, 0, 2], references=[1, 1, 2], tasks=["a", "a", "b"])
        {'a': 0.5, 'b': 1.0, 'mean': 0.75}
    """

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        features = {"predictions": classes, "references": classes, "tasks": datasets.Value("string")}
        return _info("Accuracy of each task, and their mean.", **features)

    def _compute(self, predictions: Sequence[int], references: Sequence[int], tasks: Sequence[str]) -> dict[str, float]:
        hits, names = np.asarray(predictions) == np.asarray(references), np.asarray(tasks)
        each = {str(name): float(hits[names == name].mean()) for name in sorted(set(tasks))}
        return {**each, "mean": float(np.mean(list(each.values())))}


class MeanIoU(evaluate.Metric):
    """Mean intersection over union of the classes that occur, over all pixels; 255 is ignored.

    Maps are passed as flat lists of pixels, one per image.

    Examples:
        >>> MeanIoU().compute(predictions=[[0, 1, 1, 1]], references=[[0, 0, 1, 255]])
        {'mean_iou': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Mean intersection over union.", predictions=_CLASSES, references=_CLASSES)

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, float]:
        found, truth = (np.concatenate([np.asarray(row) for row in rows]) for rows in (predictions, references))
        valid = truth != IGNORED_CLASS
        found, truth = found[valid], truth[valid]
        parts = []
        for label in np.union1d(found, truth):
            both, either = (found == label) & (truth == label), (found == label) | (truth == label)
            parts.append(both.sum() / either.sum())
        return {"mean_iou": float(np.mean(parts)) if parts else float("nan")}


class RootMeanSquaredError(evaluate.Metric):
    """Root of the mean squared error over all numbers; references that are not finite are ignored.

    Examples:
        >>> RootMeanSquaredError().compute(predictions=[[1.0], [2.0]], references=[[1.0], [4.0]])["rmse"] ** 2
        2.0000000000000004
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Root of the mean squared error.", predictions=_NUMBERS, references=_NUMBERS)

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[float]]
    ) -> dict[str, float]:
        found, truth = (np.concatenate([np.asarray(row, float) for row in rows]) for rows in (predictions, references))
        valid = np.isfinite(truth)
        return {"rmse": float(np.sqrt(np.square(found[valid] - truth[valid]).mean()))}


def metric_of(task: TaskConfig) -> evaluate.Metric:
    """The metric for a task's kind."""
    kinds = {"classification": TaskAccuracy, "segmentation": MeanIoU}
    metric: evaluate.Metric = kinds.get(task.kind, RootMeanSquaredError)(experiment_id=task.name)
    return metric


def add_outputs(metric: evaluate.Metric, task: TaskConfig, outputs: Tensor, labels: Tensor) -> None:
    """Add a batch of one task to its metric.

    Args:
        metric: From `metric_of`.
        task: The task.
        outputs: [B, C] or [B, C, h, w]; maps are resized to the labels as for the loss.
        labels: See `TaskConfig`.
    """
    if task.is_dense:
        size = labels.shape[-2:]
        outputs = outputs.float()
        outputs = interpolate(outputs, size=size, mode="bilinear", align_corners=False)
    if task.kind in ("classification", "segmentation"):
        outputs = outputs.argmax(dim=1)
    if task.kind == "classification":
        names = [task.name] * len(labels)
        metric.add_batch(predictions=outputs.tolist(), references=labels.tolist(), tasks=names)
    else:
        metric.add_batch(predictions=outputs.flatten(1).tolist(), references=labels.flatten(1).tolist())


__all__ = ["MeanIoU", "RootMeanSquaredError", "TaskAccuracy", "add_outputs", "metric_of"]
