"""Augmentation of training images with Pillow: flip, crop, colour, RandAugment.

`peft_bsr` does not import this module: it needs Pillow (`pip install 'peft-bsr[cli]'`). Random numbers come from torch:
a seed makes them reproducible, and every worker of a `DataLoader` has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from PIL import Image, ImageEnhance, ImageOps

from peft_bsr.errors import ConfigError

Strength = Literal["none", "light", "strong"]
_FILL = (128, 128, 128)


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of an image.

    `"light"`: a crop of 50 to 100 % of the area, flipped left to right with probability 0.5. `"strong"`: a crop of 25
    to 100 %, the flip, brightness, contrast and saturation by up to 30 %, then two operations of RandAugment (Cubuk et
    al. 2020). Crops have aspect ratios of 3:4 to 4:3 and are resized to the size of the image.

    Args:
        strength: `"none"`, `"light"` or `"strong"`.
        flip: Whether to flip. False if left and right differ in meaning (digits, text). Default True.

    Raises:
        ConfigError: If there is no such strength.

    Examples:
        >>> augment = Augmentation("strong")
        >>> augment(Image.new("RGB", (40, 30))).size
        (40, 30)
    """

    strength: Strength = "light"
    flip: bool = True

    def __post_init__(self) -> None:
        if self.strength not in get_args(Strength):
            raise ConfigError(f"Augmentation: `strength={self.strength!r}` is unknown. Use none, light or strong.")

    def __call__(self, image: Image.Image) -> Image.Image:
        """Augment an image.

        Args:
            image: An image of any size; modes other than RGB are converted.

        Returns:
            An RGB image of the same size.
        """
        image = image.convert("RGB")
        if self.strength == "none":
            return image
        image = random_crop(image, 0.5 if self.strength == "light" else 0.25)
        if self.flip and _uniform() < 0.5:
            image = ImageOps.mirror(image)
        if self.strength == "strong":
            image = rand_augment(colour_jitter(image, 0.3))
        return image


def random_crop(image: Image.Image, smallest: float) -> Image.Image:
    """A crop with random position, area and aspect ratio, resized to the size of the image.

    Args:
        image: An RGB image.
        smallest: Minimum share of the area.
    """
    width, height = image.size
    for _ in range(10):
        area, ratio = width * height * _uniform(smallest, 1.0), math.exp(_uniform(math.log(3 / 4), math.log(4 / 3)))
        # the ratio is that of a square image: others keep their own shape about
        across, down = math.sqrt(area * ratio * width / height), math.sqrt(area / ratio * height / width)
        if across <= width and down <= height:
            left, top = _uniform(0, width - across), _uniform(0, height - down)
            return image.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + across, top + down))
    return image


def colour_jitter(image: Image.Image, strength: float) -> Image.Image:
    """Brightness, contrast and saturation, each multiplied by `1 - strength` to `1 + strength`, in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for index in torch.randperm(len(kinds)).tolist():
        image = kinds[index](image).enhance(_uniform(1 - strength, 1 + strength))
    return image


def rand_augment(image: Image.Image, operations: int = 2, magnitude: float = 0.3) -> Image.Image:
    """RandAugment: some operations of a list, all with one magnitude, in random directions.

    Args:
        image: An RGB image.
        operations: Number of operations. Default 2.
        magnitude: From 0 (no change) to 1 (maximum). Default 0.3, the paper's 9 of 30.
    """
    for index in torch.randint(len(_OPERATIONS), (operations,)).tolist():
        image = _OPERATIONS[index](image, magnitude if _uniform() < 0.5 else -magnitude)
    return image


def _uniform(low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand(()))


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_FILL)


_OPERATIONS: list[Callable[[Image.Image, float], Image.Image]] = [  # (image, magnitude from -1 to 1)
    lambda image, m: image,
    lambda image, m: ImageOps.autocontrast(image),
    lambda image, m: ImageOps.equalize(image),
    lambda image, m: image.rotate(30 * m, Image.Resampling.BILINEAR, fillcolor=_FILL),
    lambda image, m: ImageOps.posterize(image, 8 - round(4 * abs(m))),
    lambda image, m: ImageOps.solarize(image, round(256 - 128 * abs(m))),
    lambda image, m: ImageEnhance.Color(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
    lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
    lambda image, m: _affine(image, 1, 0.3 * m, -0.15 * m * image.height, 0, 1, 0),
    lambda image, m: _affine(image, 1, 0, 0, 0.3 * m, 1, -0.15 * m * image.width),
    lambda image, m: _affine(image, 1, 0, 0.45 * m * image.width, 0, 1, 0),
    lambda image, m: _affine(image, 1, 0, 0, 0, 1, 0.45 * m * image.height),
]

__all__ = ["Augmentation", "Strength", "colour_jitter", "rand_augment", "random_crop"]
