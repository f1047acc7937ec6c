"""Checks the inputs of a model with an adapter before its forward runs, for clear errors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from peft_bsr.backbones import ModelSpec
from peft_bsr.errors import InputError


def check_inputs(name: str, spec: ModelSpec, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Raise if the input is not a batch of images.

    Args:
        name: Name of the model's main input.
        spec: Description of the model.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        InputError: If there are no images, or their shape is invalid.
    """
    images = kwargs.get(name, args[0] if args else None)
    if problem := _problem(spec, images):
        expected = ", ".join(["images", *map(str, spec.image_shape)])
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"`{name}` is {found}: {problem}. Call the model with `{name}` [{expected}].")


def _problem(spec: ModelSpec, images: object) -> str | None:
    if not isinstance(images, Tensor):
        return "that is not a tensor"
    shape, axes = images.shape, 1 + len(spec.image_shape)
    if len(shape) != axes:
        return f"{len(shape)} axes instead of {axes}"
    if shape[0] == 0:
        return "the batch is empty"
    if spec.grid is None or len(spec.grid) != 2 or axes != 4:
        return None
    if shape[1] != spec.image_shape[0]:
        return f"{shape[1]} channels instead of {spec.image_shape[0]}"
    if shape[2] < spec.patch_size[0] or shape[3] < spec.patch_size[1]:
        return f"less than one patch of {spec.patch_size[0]} x {spec.patch_size[1]} px"
    return None


__all__ = ["check_inputs"]
