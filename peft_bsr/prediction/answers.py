"""What a model's outputs for one image mean."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peft_bsr.prediction.predictor import Predictor
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION

THRESHOLD = 0.5  # of a probability, for several labels


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        file: Its name; `row 3` where it has none.
        labels: Names of classes, the most probable first; of a regression, the names of its values in their order.
        classes: Their numbers, as in the model's configuration.
        probabilities: Of `labels`: of several exclusive classes (softmax), or each by itself (sigmoid). Empty for a
            regression.
        values: Of a regression. Empty for classes.
        error: Why the image could not be read; all else is empty then. Or None.
    """

    file: str
    labels: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    error: str | None = None

    @property
    def label(self) -> str | None:
        """The most probable class, or None."""
        return self.labels[0] if self.probabilities else None

    @property
    def probability(self) -> float | None:
        """Of `label`, or None."""
        return self.probabilities[0] if self.probabilities else None


def to_prediction(
    predictor: Predictor, file: str, outputs: Tensor | str, *, top_k: int | None = 1, threshold: float = THRESHOLD
) -> Prediction:
    """The answer for one image.

    Args:
        predictor: That gave the outputs.
        file: Name of the image.
        outputs: [C] logits or values, or why there are none.
        top_k: Number of classes, the most probable ones. None: all. Of a model for several labels only None counts.
        threshold: Of a model for several labels: those at least so probable are given.
    """
    if isinstance(outputs, str):
        return Prediction(file, error=outputs)
    if predictor.problem_type == REGRESSION:
        return Prediction(file, tuple(predictor.labels), tuple(range(len(outputs))), values=tuple(outputs.tolist()))
    several = predictor.problem_type == MULTI_LABEL
    chances = outputs.sigmoid() if several else outputs.softmax(-1)
    order = chances.argsort(descending=True, stable=True).tolist()
    if several and top_k is not None:
        order = [index for index in order if chances[index] >= threshold]
    elif not several:
        order = order[:top_k]
    return Prediction(file, tuple(predictor.labels[i] for i in order), tuple(order), tuple(chances[order].tolist()))


__all__ = ["THRESHOLD", "Prediction", "to_prediction"]
