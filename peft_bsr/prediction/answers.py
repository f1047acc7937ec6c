"""From a model's outputs for one image to a prediction."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peft_bsr.prediction.predictor import Predictor
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION

THRESHOLD = 0.5  # of a probability, for several labels


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one image.

    Attributes:
        file: File name, or `row 3` if there is none.
        labels: Names of classes, the most probable first; for a regression, the names of its values in order.
        classes: Indices of `labels`, as in the model's configuration.
        probabilities: Probabilities of `labels`: softmax for exclusive classes, sigmoid for several labels. Empty for a
            regression.
        values: Values of a regression. Empty for classes.
        error: Why the image could not be read, or None. With an error, everything else is empty.
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
        """Probability of `label`, or None."""
        return self.probabilities[0] if self.probabilities else None


def to_prediction(
    predictor: Predictor, file: str, outputs: Tensor | str, *, top_k: int | None = 1, threshold: float = THRESHOLD
) -> Prediction:
    """The prediction for one image.

    Args:
        predictor: The model.
        file: Name of the image.
        outputs: Logits or values [C], or the error if there are none.
        top_k: Number of most probable classes. None: all. For several labels, only None has an effect: all labels.
        threshold: Probability from which a label is predicted, for several labels.
    """
    if isinstance(outputs, str):
        return Prediction(file, error=outputs)
    if predictor.problem_type == REGRESSION:
        return Prediction(file, tuple(predictor.labels), tuple(range(len(outputs))), values=tuple(outputs.tolist()))
    several = predictor.problem_type == MULTI_LABEL
    chances = outputs.sigmoid() if several else outputs.softmax(-1)
    order = chances.argsort(descending=True, stable=True).tolist()
    if several and top_k is not None:
        order = [index for index in order if chances[index].item() >= threshold]
    elif not several:
        order = order[:top_k]
    return Prediction(file, tuple(predictor.labels[i] for i in order), tuple(order), tuple(chances[order].tolist()))


__all__ = ["THRESHOLD", "Prediction", "to_prediction"]
