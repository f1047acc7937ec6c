"""Change the image size of a model that takes one size only, by interpolating its position table once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from peft_bsr.backbones.inputs import input_shapes, main_input
from peft_bsr.backbones.registry import inner_config
from peft_bsr.compat.torch_api import unsaved_buffers
from peft_bsr.errors import ConfigError, UnsupportedModelError

_INTERPOLATE = "interpolate_pos_encoding"  # method and argument of transformers
_RESIZED = "resized_tables"  # attribute of the module with that method: names of its tables that were resized


@torch.inference_mode(False)  # a parameter created in inference mode can never train
def set_image_size(model: nn.Module, image_size: int | tuple[int, int]) -> None:
    """Change the image size of a model.

    The position table is replaced by what `interpolate_pos_encoding=True` of transformers computes at every call, so
    the model gives the same outputs without that argument, and its configuration gets the new size. A saved model has
    the new size. An adapter stores it: `peft_bsr.load` resizes the base model again. Models that always interpolate
    (DINOv2, BEiT) take any size and are not changed.

    Args:
        model: A transformers model with pretrained weights, without an adapter.
        image_size: Side in pixels, or (height, width) if the model's own interpolation supports it (ViT; not CLIP).

    Raises:
        ConfigError: If a side is not a multiple of the patch size, or if the model already has an adapter.
        UnsupportedModelError: If the model has no interpolation or no configuration. The model is unchanged.

    Examples:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = ViTForImageClassification(tiny)
        >>> set_image_size(model, 384)
        >>> model.config.image_size, model.vit.embeddings.position_embeddings.shape[1]
        (384, 577)
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    config = _config_of(model, height)
    if native_size(config) in (None, (height, width)):
        return
    _check_patches(model, height, width)
    larger = _resized_copy(model, height, width)
    tables = _tables(model, larger)
    if _takes_any(model, tables, height, width) and tables:
        return
    resized = {name: _interpolated(model, larger, name, owner, height, width) for name, owner in tables.items()}
    for name, table in resized.items():
        _put(model, name, tables[name], table)
    for owner in set(tables.values()):
        _follow(model.get_submodule(owner), larger.get_submodule(owner))
    _tell_configs(model, height, width)


def native_size(config: PreTrainedConfig) -> tuple[int, int] | None:
    """(height, width) in a model's configuration, or None."""
    size = getattr(inner_config(config), "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size[:2]
    return int(height), int(width)


def resized_tables(model: nn.Module) -> set[str]:
    """Names of the parameters that `set_image_size` resized."""
    return {
        f"{name}.{table}" if name else table
        for name, module in model.named_modules()
        for table in getattr(module, _RESIZED, ())
    }


def _config_of(model: nn.Module, height: int) -> PreTrainedConfig:
    """The configuration of the model's vision part."""
    config = inner_config(getattr(model, "config", None))
    if hasattr(model, "get_base_model"):  # a PeftModel, whose ModelSpec has the old size
        raise ConfigError(
            f"`image_size={height}`: {type(model).__name__} already has an adapter. Set the size of the base model "
            "first, or load the adapter with `peft_bsr.load(adapter, image_size=...)`."
        )
    if config is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config, which is needed to change its image size. Give the transformers "
            "model inside."
        )
    return config


def _check_patches(model: nn.Module, height: int, width: int) -> None:
    config = inner_config(model.config)
    patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None) or 1
    for side, step in zip((height, width), (patch, patch) if isinstance(patch, int) else patch[-2:], strict=True):
        if side < step or side % step:
            fitting = [size for size in (side // step * step, (side // step + 1) * step) if size]
            raise ConfigError(
                f"`image_size={side}`: {type(model).__name__} cuts images into patches of {step} px, so each side must "
                f"be a multiple of {step}. Use {' or '.join(map(str, fitting))}."
            )


def _resized_copy(model: nn.Module, height: int, width: int) -> nn.Module:
    """The same model of that size, on the meta device."""
    config = copy.deepcopy(model.config)
    inner: PreTrainedConfig = inner_config(config)
    inner.image_size = _like(inner.image_size, height, width)
    make: type[nn.Module] = type(model)
    try:
        with torch.device("meta"):
            resized = make(config)
    except Exception as error:
        raise _unsupported(model, height, width, f"{type(error).__name__}: {error}") from error
    return resized


def _tables(model: nn.Module, resized: nn.Module) -> dict[str, str]:
    """Name of each parameter that has another shape at that size -> name of the module that interpolates it, or ""."""
    sizes = {name: parameter.shape for name, parameter in resized.named_parameters()}
    found = [
        name for name, parameter in model.named_parameters() if parameter.shape != sizes.get(name, parameter.shape)
    ]
    return {name: _owner(model, name) for name in found}


def _owner(model: nn.Module, name: str) -> str:
    while name:
        name = name.rpartition(".")[0]
        if callable(getattr(model.get_submodule(name), _INTERPOLATE, None)):
            return name
    return ""


def _takes_any(model: nn.Module, tables: dict[str, str], height: int, width: int) -> bool:
    """Whether the model takes images of that size unchanged, without an argument that turns interpolation on."""
    owners = [model.get_submodule(owner) for owner in tables.values() if owner]
    if any(_INTERPOLATE in inspect.signature(owner.forward).parameters for owner in owners):
        return False
    native = native_size(model.config)
    assert native is not None
    resized = _resized_copy(model, *native).eval()
    if _runs(resized, height, width):
        return True
    if not tables and _runs(resized, *native):
        raise _unsupported(model, height, width, "its forward refuses them, and nothing interpolates its positions")
    return not tables


def _runs(resized: nn.Module, height: int, width: int) -> bool:
    try:
        with torch.no_grad():
            shape = (*input_shapes(resized)[-1][:-2], height, width)
            resized(**{main_input(resized): torch.empty(1, *shape, device="meta")})
    except Exception:  # models raise any exception for a size that they do not take
        return False
    return True


def _interpolated(model: nn.Module, resized: nn.Module, name: str, owner: str, height: int, width: int) -> Tensor:
    """A table, interpolated by the model's own method."""
    if not owner:
        raise _unsupported(model, height, width, f"nothing interpolates its `{name}`")
    table, shape = model.get_parameter(name), resized.get_parameter(name).shape
    try:
        with torch.no_grad():
            interpolate: Callable[[Tensor, int, int], Tensor] = getattr(model.get_submodule(owner), _INTERPOLATE)
            found = interpolate(table.new_empty((1, *shape[-2:])), height, width)
        return found.reshape(shape).to(table.dtype)
    except Exception as error:
        raise _unsupported(model, height, width, f"`{owner}.{_INTERPOLATE}` failed with {error!r}") from error


def _put(model: nn.Module, name: str, owner: str, table: Tensor) -> None:
    place, _, last = name.rpartition(".")
    module = model.get_submodule(place)
    before = module.get_parameter(last)
    module.register_parameter(last, nn.Parameter(table.contiguous(), requires_grad=before.requires_grad))
    holder = model.get_submodule(owner)
    relative = name.removeprefix(f"{owner}.")
    setattr(holder, _RESIZED, tuple(sorted({*getattr(holder, _RESIZED, ()), relative})))


def _follow(owner: nn.Module, resized: nn.Module) -> None:
    """Copy the plain attributes and position indices that depend on the size."""
    for module, other in zip(owner.modules(), resized.modules(), strict=True):
        for name, value in vars(other).items():
            if isinstance(value, (int, tuple, list)) and not name.startswith("_") and name != "training":
                setattr(module, name, value)
        for name, buffer in list(other.named_buffers(recurse=False)):
            mine = module.get_buffer(name)
            if mine.shape != buffer.shape and not mine.is_floating_point():
                numbers = torch.arange(buffer.shape[-1], device=mine.device, dtype=mine.dtype).expand(buffer.shape)
                module.register_buffer(name, numbers, persistent=name not in unsaved_buffers(module))


def _tell_configs(model: nn.Module, height: int, width: int) -> None:
    """Set the size in the configs of the model and its parts, which are copied first: other models may share them."""
    native = native_size(model.config)
    copies: dict[int, object] = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, copies)
            inner: PreTrainedConfig = inner_config(module.config)
            if native_size(inner) == native:
                inner.image_size = _like(inner.image_size, height, width)


def _like(size: int | Sequence[int], height: int, width: int) -> int | Sequence[int]:
    """The new size in the configuration's format: one number or two."""
    if isinstance(size, int):
        return height if height == width else [height, width]
    make: Callable[[tuple[int, int]], Sequence[int]] = type(size)
    return make((height, width))


def _unsupported(model: nn.Module, height: int, width: int, why: str) -> UnsupportedModelError:
    native = " x ".join(map(str, native_size(model.config) or ()))
    return UnsupportedModelError(
        f"{type(model).__name__} takes images of {native} px only, not of {height} x {width}: {why}. Leave the size "
        "out, or use a model that takes any size, such as DINOv2."
    )


__all__ = ["native_size", "resized_tables", "set_image_size"]
