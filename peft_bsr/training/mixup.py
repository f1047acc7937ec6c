"""Mixup and CutMix within a batch, as a dataset wrapper, so that evaluation is not affected."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn.functional import one_hot
from torch.utils.data import Dataset

from peft_bsr.errors import ConfigError
from peft_bsr.training.types import Example, MapStyleDataset


class MixupDataset(Dataset):
    """The examples of a dataset with soft labels, mixed within each batch.

    A `DataLoader` reads a whole batch at once. With `probability`, the batch is mixed with its own images in another
    order: by Mixup (Zhang et al. 2018; `share * image + (1 - share) * other`) or CutMix (Yun et al. 2019; a rectangle
    of the other image), each with probability 0.5 if both are on. Labels become class probabilities. Random numbers
    come from torch in the process that loads.

    Labels are floats [C], which a model's own loss would treat as several labels per image: pass
    `compute_loss_func=TrainingLoss()` to Trainer.

    Args:
        dataset: Dataset of dicts with `pixel_values` [3, H, W], all of one size, and `labels` (a class index, or floats
            [C] of 0 and 1 for several labels).
        num_classes: Number of classes C.
        mixup: Alpha of Mixup's Beta(alpha, alpha); 0 turns it off. Default 0.2.
        cutmix: Alpha of CutMix's Beta(alpha, alpha); 0 turns it off. Default 1.
        probability: Share of batches that are mixed. Default 0.5.

    Raises:
        ConfigError: If a number is invalid.

    Examples:
        >>> images = [{"pixel_values": torch.full((3, 4, 4), float(i)), "labels": i} for i in range(2)]
        >>> mixed = MixupDataset(images, num_classes=2, cutmix=0, probability=1.0)
        >>> mixed[1]["labels"]  # a single example is not mixed
        tensor([0., 1.])
        >>> batch = next(iter(torch.utils.data.DataLoader(mixed, batch_size=2)))
        >>> batch["labels"].sum(1)
        tensor([1., 1.])
    """

    def __init__(
        self,
        dataset: MapStyleDataset,
        num_classes: int,
        *,
        mixup: float = 0.2,
        cutmix: float = 1.0,
        probability: float = 0.5,
    ) -> None:
        problems = [
            f"`{name}={value!r}` must be at least 0."
            for name, value in (("mixup", mixup), ("cutmix", cutmix))
            if not value >= 0
        ]
        if not 0 <= probability <= 1:
            problems.append(f"`probability={probability!r}` must be from 0 to 1.")
        if num_classes < 2:
            problems.append(f"`num_classes={num_classes!r}` must be at least 2.")
        if problems:
            raise ConfigError.from_problems("MixupDataset", problems)
        self.dataset, self.num_classes = dataset, num_classes
        self.mixup, self.cutmix, self.probability = mixup, cutmix, probability

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        return self._softened(self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Example]:
        """A batch, for torch's DataLoader."""
        together = getattr(self.dataset, "__getitems__", None)
        examples = together(indices) if together else [self.dataset[index] for index in indices]
        examples = [self._softened(example) for example in examples]
        if (not self.mixup and not self.cutmix) or float(torch.rand(())) >= self.probability:
            return examples
        uses_cutmix = bool(self.cutmix) and (not self.mixup or float(torch.rand(())) < 0.5)
        alpha = self.cutmix if uses_cutmix else self.mixup
        share = float(Beta(torch.tensor(alpha), torch.tensor(alpha)).sample())
        order = torch.randperm(len(examples)).tolist()
        pixels: list[Tensor] = [example["pixel_values"] for example in examples]
        if uses_cutmix:
            rows, columns, share = _rectangle(pixels[0].shape[-2], pixels[0].shape[-1], share)
        mixed = []
        for example, own, other in zip(examples, pixels, order, strict=True):
            if uses_cutmix:
                image = own.clone()
                image[..., rows, columns] = pixels[other][..., rows, columns]
            else:
                image = share * own + (1 - share) * pixels[other]
            labels = share * example["labels"] + (1 - share) * examples[other]["labels"]
            mixed.append({**example, "pixel_values": image, "labels": labels})
        return mixed

    def _softened(self, example: Example) -> Example:
        labels = torch.as_tensor(example["labels"])
        soft = labels if labels.is_floating_point() else one_hot(labels, self.num_classes).float()
        return {**example, "labels": soft}


def _rectangle(height: int, width: int, share: float) -> tuple[slice, slice, float]:
    """A random rectangle of about `1 - share` of the image, and the exact share outside of it."""
    side = math.sqrt(1 - share)
    middle_row, middle_column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    rows = slice(max(middle_row - half_height, 0), min(middle_row + half_height, height))
    columns = slice(max(middle_column - half_width, 0), min(middle_column + half_width, width))
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return rows, columns, 1 - area / (height * width)


__all__ = ["MixupDataset"]
