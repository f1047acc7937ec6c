"""Quantizes the weights of blocks that never train, in the model itself: to int8 with torchao, or to bfloat16."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec, probe_inputs, quiet, run_probe, tensors_of
from peft_bsr.compat.torch_api import PARAMETERS, leave_to_ddp
from peft_bsr.core import is_quantized, kept_bytes
from peft_bsr.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from peft_bsr.ops import FrozenLinear, exact_parameters, freeze_linear
from peft_bsr.tuners.base.classifier import without_layer

if TYPE_CHECKING:
    from peft_bsr.tuners.base.config import SavedConfig

logger = logging.getLogger(__name__)

FrozenWeights = Literal["full", "int8", "bfloat16"]
FROZEN_WEIGHTS_HELP = "'full', 'int8' or 'bfloat16': weights of frozen blocks are rounded so in the model, for good."

_LARGEST_ERROR = 0.1  # relative error of the outputs; 1e-2 is usual in int8, 1e-3 in bfloat16
_CALLED = {"int8": "8 bits", "bfloat16": "bfloat16"}
_ROOT = "base_model.model."


def linears_to_round(
    model: nn.Module, spec: ModelSpec, config: SavedConfig, trained: Collection[int], exact_names: Collection[str] = ()
) -> dict[str, str]:
    """Linear modules to round for an adapter, name -> `"int8"` or `"bfloat16"`: those in blocks that do not train.

    Args:
        model: The model.
        spec: Description of the model.
        config: Configuration of the adapter.
        trained: Indices of the blocks that train.
        exact_names: Roles of leaf modules that are never rounded.

    Raises:
        ConfigError: If bfloat16 is requested for a model in float16.
    """
    how = config.frozen_weights
    if how == "full":
        return {}
    if len(set(trained)) == spec.depth:
        logger.warning("%s: `frozen_weights=%r` rounds nothing, because every block trains", type(model).__name__, how)
    names = [
        f"{block}.{leaf}"
        for index, block in enumerate(spec.blocks)
        for role, leaf in spec.paths_of(index).items()
        if index not in trained and role not in exact_names
    ]
    found = {name: without_layer(model.get_submodule(name)) for name in names}
    modules = {
        name: module for name, module in found.items() if type(module) is nn.Linear or isinstance(module, FrozenLinear)
    }
    if how == "bfloat16":
        whole = {name: module.weight.dtype for name, module in modules.items() if type(module) is nn.Linear}
        if torch.float16 in whole.values():
            raise ConfigError(
                "`frozen_weights='bfloat16'` with a model in float16: its weights would take the same memory and lose "
                '3 bits each. Use `frozen_weights="full"`, or load the model in float32 or bfloat16.'
            )
        there = [name for name, dtype in whole.items() if dtype == torch.bfloat16]
        if there:
            logger.info("%s: %d frozen Linear modules are in bfloat16 already", type(model).__name__, len(there))
        modules = {name: module for name, module in modules.items() if name not in there}
    return dict.fromkeys(modules, how)


def check_rounded(model: nn.Module, spec: ModelSpec, wanted: Mapping[str, str], has_others: bool) -> None:
    """Raise if the adapter needs other rounded weights than the model has for its other adapters, or from earlier.

    Args:
        model: The model.
        spec: Description of the model.
        wanted: Modules to round for the adapter, see `linears_to_round`.
        has_others: Whether the model has adapters already.

    Raises:
        ConfigError: If the rounded weights differ.
    """
    found = {
        name: "int8" if is_quantized(module.weight) else "bfloat16"
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear)
    }
    if found == wanted or not (found or has_others):
        return

    def described(rounded: Mapping[str, str]) -> str:
        blocks = [i for i, block in enumerate(spec.blocks) if any(name.startswith(f"{block}.") for name in rounded)]
        return f"{next(iter(rounded.values()))!r} in blocks {blocks}" if rounded else "'full'"

    raise ConfigError(
        f"the adapter needs frozen weights {described(wanted)}, but in this model they are {described(found)}. All "
        "adapters of a model share its frozen weights: use the same `frozen_weights` and trained blocks, or load the "
        "model again."
    )


@contextmanager
def tried_rounding(model: nn.Module, spec: ModelSpec, wanted: Mapping[str, str]) -> Iterator[None]:
    """Context manager: round the modules temporarily, and log the error of the model's outputs.

    Args:
        model: The model.
        spec: Description of the model.
        wanted: The modules, see `linears_to_round`. Some may be rounded already.

    Raises:
        MissingDependencyError: If torchao is not installed.
        UnsupportedModelError: If outputs change by more than a tenth.
    """
    modules = _not_rounded(model, wanted)
    if not modules:
        yield
        return
    how = _CALLED[next(iter(wanted.values()))]
    inputs = probe_inputs(model, 1, spec.image_shape)
    with quiet(model):
        expected = _floats(run_probe(model, inputs))
    before = _mebibytes(modules.values())
    with _put_back(modules.values()):
        _round(modules, wanted)
        with quiet(model):
            found = _floats(run_probe(model, inputs))
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        logger.info(
            "%s: weights of %d frozen Linear modules in %s take %.1f MiB instead of %.1f; outputs differ by %.1e",
            *(type(model).__name__, len(modules), how, _mebibytes(modules.values()), before, error),
        )
        if not error <= _LARGEST_ERROR:
            raise UnsupportedModelError(
                f"{type(model).__name__}: with its frozen weights in {how} its outputs differ by {error:.0%}. Use "
                '`frozen_weights="full"`.'
            )
        yield


@contextmanager
def in_one_dtype(model: nn.Module) -> Iterator[None]:
    """Context manager: weights in bfloat16 are cast to the model's dtype, so that lean blocks run without autocast."""
    held = [m for m in model.modules() if isinstance(m, FrozenLinear) and not is_quantized(m.weight)]
    dtype = next(exact_parameters(model)).dtype
    with _put_back(held):
        for module in held:
            _replace(module, lambda tensor: tensor.to(dtype))
        yield


def round_weights(model: nn.Module, wanted: Mapping[str, str]) -> None:
    """Round the modules that are not rounded yet, permanently.

    Args:
        model: The model.
        wanted: The modules, see `linears_to_round`.
    """
    _round(_not_rounded(model, wanted), wanted)


def tell_ddp(model: nn.Module, offloaded: Sequence[str] = ()) -> None:
    """Tell DistributedDataParallel which weights to ignore, around the model or around its PeftModel.

    Offloaded weights are on the CPU, and it rejects a model on two devices; quantized weights it cannot broadcast.

    Args:
        model: The model.
        offloaded: Names of its offloaded parameters.
    """
    names = [*offloaded, *(name for name, parameter in model.named_parameters() if is_quantized(parameter))]
    leave_to_ddp(model, [*names, *(f"{_ROOT}{name}" for name in names)])


def _not_rounded(model: nn.Module, wanted: Iterable[str]) -> dict[str, nn.Linear]:
    modules = {name: model.get_submodule(name) for name in wanted}
    return {name: module for name, module in modules.items() if type(module) is nn.Linear}


def _in_8_bits(weight: Tensor) -> Tensor:
    try:
        from torchao.quantization import Int8Tensor, PerRow
    except ImportError as error:
        raise MissingDependencyError(
            '`frozen_weights="int8"` needs torchao, which cannot be imported here '
            f'({error}). Install it with `pip install peft-bsr[quantization]`, or use `frozen_weights="full"`.'
        ) from error
    # not `quantize_`, which sets global flags of torch.compile
    rounded: Tensor = Int8Tensor.from_hp(weight, granularity=PerRow())
    return rounded


_ROUNDINGS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "int8": (_in_8_bits, ("weight",)),
    "bfloat16": (Tensor.bfloat16, ("weight", "bias")),  # autocast casts both
}


def _round(modules: Mapping[str, nn.Linear], wanted: Mapping[str, str]) -> None:
    for name, module in modules.items():
        _replace(module, *_ROUNDINGS[wanted[name]])
        freeze_linear(module)


def _replace(module: nn.Linear, made_of: Callable[[Tensor], Tensor], names: Sequence[str] = ("weight", "bias")) -> None:
    """Replace parameters by `made_of(parameter)`. The original tensors are not changed."""
    for name, parameter in list(module.named_parameters()):
        if name in names:  # not `setattr`: PEFT's low_cpu_mem_usage would move it to the meta device
            getattr(module, PARAMETERS)[name] = nn.Parameter(made_of(parameter.detach()), requires_grad=False)


@contextmanager
def _put_back(modules: Iterable[nn.Linear]) -> Iterator[None]:
    """Context manager: class and parameters of the modules are restored at the end."""
    before = [(module, type(module), dict(getattr(module, PARAMETERS))) for module in modules]
    try:
        yield
    finally:
        for module, cls, parameters in before:
            module.__class__ = cls
            getattr(module, PARAMETERS).update(parameters)


def _mebibytes(modules: Iterable[nn.Module]) -> float:
    return sum(kept_bytes(parameter) for module in modules for parameter in module.parameters()) / 2**20


def _floats(output: object) -> list[Tensor]:
    return [tensor.float() for tensor in tensors_of(output) if tensor.is_floating_point()]


__all__ = [
    "FROZEN_WEIGHTS_HELP",
    "FrozenWeights",
    "check_rounded",
    "in_one_dtype",
    "linears_to_round",
    "round_weights",
    "tell_ddp",
    "tried_rounding",
]
