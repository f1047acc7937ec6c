"""Losses for classification, multi-label classification and regression, for Trainer's `compute_loss_func`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor
from torch.nn import functional

from peft_bsr.errors import ConfigError, InputError
from peft_bsr.problem_type import REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    import numpy as np


class TrainingLoss:
    """The loss of a batch, for soft labels, class weights and gradient accumulation.

    Without gradients (in evaluation) it is the plain loss, without class weights and label smoothing, so that losses of
    different runs can be compared.

    Args:
        problem_type: `"single_label_classification"` (cross entropy; class indices [B], or class probabilities [B, C]
            as with mixup), `"multi_label_classification"` (binary cross entropy, labels [B, C] of 0 and 1) or
            `"regression"` (squared error, labels [B] or [B, C]). Default single_label_classification.
        class_weights: Factor of the loss for each class; with several labels per image, of the images that have the
            label (`pos_weight`). See `balanced_weights`. Default None: 1 each.
        label_smoothing: Label smoothing in [0, 1). Default 0.

    Raises:
        ConfigError: If a value is invalid.

    Examples:
        >>> loss = TrainingLoss(class_weights=[1.0, 3.0], label_smoothing=0.1)
        >>> # Trainer(model, args, compute_loss_func=loss, ...)
        >>> float(TrainingLoss()({"logits": torch.zeros(2, 4)}, torch.tensor([0, 3])))
        1.3862943649291992
    """

    def __init__(
        self,
        problem_type: ProblemType = SINGLE_LABEL,
        *,
        class_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        problems = []
        if problem_type not in get_args(ProblemType):
            problems.append(
                f"`problem_type={problem_type!r}` is unknown. Use one of {', '.join(get_args(ProblemType))}."
            )
        if not 0 <= label_smoothing < 1:
            problems.append(f"`label_smoothing={label_smoothing!r}` must be from 0 to below 1, such as 0.1.")
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        if weights is not None and not (weights.ndim == 1 and bool((weights >= 0).all() & weights.isfinite().all())):
            problems.append("`class_weights` must be one number of at least 0 per class.")
        if problem_type == REGRESSION and (weights is not None or label_smoothing):
            problems.append("`problem_type='regression'` has no classes to weight or smooth.")
        if problems:
            raise ConfigError.from_problems("TrainingLoss", problems)
        self.problem_type, self.class_weights, self.label_smoothing = problem_type, weights, label_smoothing

    def __call__(
        self, outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The mean over images, or over the images of all accumulated batches.

        Args:
            outputs: Outputs of the model, with `logits` [B, C].
            labels: See `problem_type`.
            num_items_in_batch: Trainer's count of numbers in the labels of all accumulated batches.

        Raises:
            InputError: If labels do not fit the logits.
        """
        logits: Tensor = outputs["logits"].float()
        is_training = logits.requires_grad
        weights = self.class_weights if is_training else None
        if weights is not None and len(weights) != logits.shape[-1]:
            raise InputError(
                f"`class_weights` has {len(weights)} numbers, but the model has {logits.shape[-1]} classes."
            )
        weights = None if weights is None else weights.to(logits.device)
        losses = self._losses(logits, labels, weights, self.label_smoothing if is_training else 0.0)
        if num_items_in_batch is None:
            return losses.mean()
        numbers_an_image = labels[0].numel()
        return losses.sum() / (num_items_in_batch / numbers_an_image)

    def _losses(self, logits: Tensor, labels: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
        """Loss of each image, [B]."""
        if self.problem_type == SINGLE_LABEL:
            if labels.is_floating_point() and labels.shape != logits.shape:
                raise InputError(
                    f"labels {tuple(labels.shape)} of {labels.dtype} with logits {tuple(logits.shape)}: labels must "
                    "be class indices [B], or class probabilities [B, C]."
                )
            return functional.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="none")
        logits = logits.squeeze(-1) if labels.ndim < logits.ndim else logits
        if logits.shape != labels.shape:
            raise InputError(f"labels {tuple(labels.shape)} do not fit the logits {tuple(logits.shape)}.")
        targets = labels.float()
        if self.problem_type == REGRESSION:
            losses = functional.mse_loss(logits, targets, reduction="none")
        else:
            targets = targets * (1 - smoothing) + smoothing / 2
            losses = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def balanced_weights(
    labels: Sequence[int] | Sequence[Sequence[float]] | np.ndarray | Tensor, num_classes: int | None = None
) -> Tensor:
    """Class weights that give every class the same influence, however many images it has.

    Args:
        labels: Class indices [N], or 0 and 1 [N, C] for several labels per image.
        num_classes: C; classes without images have weight 1, and so have labels that all images have. Default None:
            the largest label + 1.

    Returns:
        [C]. For one label per image: `N / (classes found * images of the class)`, so that the mean weight of an image
        is 1 (scikit-learn's "balanced"). For several: images without the label over images with it, for `pos_weight`.

    Raises:
        ConfigError: If there are no labels, or a label is out of range.

    Examples:
        >>> balanced_weights([0, 0, 0, 1])
        tensor([0.6667, 2.0000])
    """
    found = torch.as_tensor(labels)
    if found.numel() == 0 or found.ndim > 2:
        raise ConfigError(f"labels of the shape {tuple(found.shape)}: balanced weights need [N] or [N, C] labels.")
    if found.ndim == 2:
        having = found.float().sum(0)
        varies = (having > 0) & (having < len(found))  # a weight of 0 would leave the label without a loss
        return torch.where(varies, (len(found) - having) / having.clamp(min=1), 1.0)
    if bool((found < 0).any()) or (num_classes is not None and int(found.max()) >= num_classes):
        raise ConfigError(f"labels from {int(found.min())} to {int(found.max())} do not fit {num_classes} classes.")
    counts = torch.bincount(found.long(), minlength=num_classes or 0).float()
    return torch.where(counts > 0, len(found) / (counts.clamp(min=1) * (counts > 0).sum()), 1.0)


__all__ = ["TrainingLoss", "balanced_weights"]
