"""Scaling of regression targets for training, and folding the scale into the trained head.

`peft_bsr` does not import this module: it needs `datasets` (`pip install 'peft-bsr[cli]'`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from peft_bsr.backbones import in_mode
from peft_bsr.data import collate
from peft_bsr.errors import UnsupportedModelError
from peft_bsr.training.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TargetScale:
    """Scales each value to mean 0 and standard deviation 1 over the training images.

    A head starts near 0 and moves in steps of the learning rate: it cannot reach prices around 100000. Train on batches
    of `collate`, then call `fold_into(model, pixels)`: it changes the last layer so that the model gives unscaled
    values.

    Attributes:
        mean: Mean of the training values, [C].
        deviation: Standard deviation of the training values, [C], above 0.

    Examples:
        >>> scale = TargetScale.of(labels_of(data.train))  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=train, data_collator=scale.collate).train()  # doctest: +SKIP
        >>> scale.fold_into(model, pixels)  # doctest: +SKIP
    """

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> TargetScale:
        """The scale of some values.

        Args:
            values: [N, C]. A constant column gets deviation 1.
        """
        found = values.astype(np.float64)
        deviation = found.std(axis=0)
        return cls(found.mean(axis=0), np.where(deviation > 0, deviation, 1.0))

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch with scaled labels, see `peft_bsr.data.collate`.

        Args:
            examples: Examples with `labels` [C].
        """
        batch = collate(examples)
        values = (batch["labels"].double().numpy() - self.mean) / self.deviation
        return {**batch, "labels": torch.from_numpy(values).float()}

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Original values [N, C].

        Args:
            values: Scaled values [N, C].
        """
        return values * self.deviation + self.mean

    def fold_into(self, model: nn.Module, pixels: Tensor) -> None:
        """Change a model that was trained on scaled values so that it gives unscaled ones.

        Args:
            model: The trained model; its last layer is changed in place.
            pixels: Some images [B, 3, H, W], to find the last layer.

        Raises:
            UnsupportedModelError: See `output_layer`.
        """
        layer = output_layer(model, pixels)
        weight, bias = layer.weight.detach(), layer.bias.detach()
        deviation = torch.from_numpy(self.deviation).to(weight.device)
        mean = torch.from_numpy(self.mean).to(weight.device)
        with torch.no_grad():
            layer.weight.copy_(weight.double() * deviation[:, None])
            layer.bias.copy_(bias.double() * deviation + mean)

    def describe(self, names: Sequence[str]) -> str:
        """The scale as text.

        Args:
            names: Names of the values.
        """
        pairs = zip(names, self.mean, self.deviation, strict=True)
        said = "; ".join(f"{name}: mean {mean:.4g}, deviation {deviation:.4g}" for name, mean, deviation in pairs)
        return f"trained on values with mean 0 and deviation 1 ({said}); the saved model gives unscaled values"


def output_layer(model: PreTrainedModel, pixels: Tensor) -> nn.Linear:
    """The trained Linear module with a bias whose output is the model's `logits`.

    Args:
        model: A model with a classifier.
        pixels: Some images [B, 3, H, W].

    Raises:
        UnsupportedModelError: If there is no such module.
    """
    seen: list[tuple[nn.Linear, Tensor]] = []
    trained = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad and m.bias is not None]
    handles = [m.register_forward_hook(lambda module, _, output: seen.append((module, output))) for m in trained]
    try:
        with in_mode(False, model), torch.no_grad():
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits
    finally:
        for handle in handles:
            handle.remove()
    found = [m for m, output in seen if output.shape == logits.shape and torch.equal(output.to(logits.dtype), logits)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no trained Linear module with a bias gives its `logits`, so the scale of the "
            "values cannot be folded in."
        )
    return found[-1]


__all__ = ["TargetScale", "output_layer"]
