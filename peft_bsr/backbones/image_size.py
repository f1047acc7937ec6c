"""Models that take images of one size only, made to take another: their position table is interpolated once."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from peft_bsr.backbones.inputs import input_shapes, main_input
from peft_bsr.backbones.registry import inner_config
from peft_bsr.compat.torch_api import unsaved_buffers
from peft_bsr.errors import ConfigError, UnsupportedModelError

_INTERPOLATE = "interpolate_pos_encoding"  # method and argument of transformers
_RESIZED = "resized_tables"  # attribute of the module with that method: names of its tables that were resized


@torch.inference_mode(False)  # a table that is made there can never train
def set_image_size(model: nn.Module, image_size: int | tuple[int, int]) -> None:
    """Have a model take images of another size.

    The position table becomes what transformers' `interpolate_pos_encoding=True` makes of it at every call, so that the
    model gives the same outputs without that argument; its configuration says the new size. So a saved model is one of
    that size, and an adapter remembers it: `peft_bsr.load` resizes its base model again. Models that interpolate
    by themselves (DINOv2, BEiT) take any size already and are left as they are.

    Args:
        model: Of transformers, with pretrained weights, and before an adapter is attached.
        image_size: Pixels of a side, or (height, width) where the model's own interpolation takes that (ViT; not CLIP).

    Raises:
        ConfigError: If a side is no multiple of the patches', or if the model has an adapter already.
        UnsupportedModelError: If the model has no interpolation, or no configuration. It is unchanged.

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


def native_size(config: Any) -> tuple[int, int] | None:
    """Height and width that a model's configuration names, or None."""
    size = getattr(inner_config(config), "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size[:2]
    return int(height), int(width)


def resized_tables(model: nn.Module) -> set[str]:
    """Names of the parameters that `set_image_size` made out of the pretrained ones."""
    return {
        f"{name}.{table}" if name else table
        for name, module in model.named_modules()
        for table in getattr(module, _RESIZED, ())
    }


def _config_of(model: nn.Module, height: int) -> Any:
    """The configuration of the model's vision part."""
    config = inner_config(getattr(model, "config", None))
    if hasattr(model, "get_base_model"):  # PEFT's, whose column is of the size before
        raise ConfigError(
            f"`image_size={height}`: {type(model).__name__} has an adapter already. Set the size of the base model "
            "before, or load the adapter with `peft_bsr.load(adapter, image_size=...)`."
        )
    if config is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config, by which its size could be changed. Give the model of transformers "
            "that is in it."
        )
    return config


def _check_patches(model: nn.Module, height: int, width: int) -> None:
    config = inner_config(model.config)
    patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None) or 1
    for side, step in zip((height, width), (patch, patch) if isinstance(patch, int) else patch[-2:], strict=True):
        if side < step or side % step:
            fitting = [size for size in (side // step * step, (side // step + 1) * step) if size]
            raise ConfigError(
                f"`image_size={side}`: {type(model).__name__} cuts images into patches of {step} px, and this is no "
                f"multiple of it. Use {' or '.join(map(str, fitting))}."
            )


def _resized_copy(model: nn.Module, height: int, width: int) -> nn.Module:
    """The same model without weights, made for that size."""
    config = copy.deepcopy(model.config)
    inner: Any = inner_config(config)
    inner.image_size = _like(inner.image_size, height, width)
    make: Any = type(model)
    try:
        with torch.device("meta"):
            resized: nn.Module = make(config)
    except Exception as error:
        raise _unsupported(model, height, width, f"{type(error).__name__}: {error}") from error
    return resized


def _tables(model: nn.Module, resized: nn.Module) -> dict[str, str]:
    """Parameters that have another shape at that size -> the module that can interpolate them, or ""."""
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
    """Whether the model takes images of that size as it is. One with a switch for that has to be told."""
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
    except Exception:  # whatever a model says of a size that it does not take
        return False
    return True


def _interpolated(model: nn.Module, resized: nn.Module, name: str, owner: str, height: int, width: int) -> Tensor:
    """What the model's own interpolation makes of a table."""
    if not owner:
        raise _unsupported(model, height, width, f"nothing interpolates its `{name}`")
    table, shape = model.get_parameter(name), resized.get_parameter(name).shape
    try:
        with torch.no_grad():
            interpolate: Any = getattr(model.get_submodule(owner), _INTERPOLATE)
            found: Tensor = interpolate(table.new_empty((1, *shape[-2:])), height, width)
        return found.reshape(shape).to(table.dtype)
    except Exception as error:
        raise _unsupported(model, height, width, f"`{owner}.{_INTERPOLATE}` failed with {error!r}") from error


def _put(model: nn.Module, name: str, owner: str, table: Tensor) -> None:
    place, _, last = name.rpartition(".")
    module = model.get_submodule(place)
    before = module.get_parameter(last)
    module.register_parameter(last, nn.Parameter(table.contiguous(), requires_grad=before.requires_grad))
    holder: Any = model.get_submodule(owner)
    relative = name.removeprefix(f"{owner}.")
    setattr(holder, _RESIZED, tuple(sorted({*getattr(holder, _RESIZED, ()), relative})))


def _follow(owner: nn.Module, resized: nn.Module) -> None:
    """Take over the plain numbers and position numbers that go with a size."""
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
    """Its own and its parts'. They are copied first: another model may have been made of the same ones."""
    native = native_size(model.config)
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, copies)
            inner: Any = inner_config(module.config)
            if native_size(inner) == native:
                inner.image_size = _like(inner.image_size, height, width)


def _like(size: Any, height: int, width: int) -> Any:
    """As the configuration has it: one number, or two."""
    if isinstance(size, int):
        return height if height == width else [height, width]
    return type(size)((height, width))


def _unsupported(model: nn.Module, height: int, width: int, why: str) -> UnsupportedModelError:
    native = " x ".join(map(str, native_size(model.config) or ()))
    return UnsupportedModelError(
        f"{type(model).__name__} takes images of {native} px alone, not of {height} x {width}: {why}. Leave the size "
        "out, or take a model that takes any size, such as DINOv2."
    )


__all__ = ["native_size", "resized_tables", "set_image_size"]
