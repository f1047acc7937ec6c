"""Weights of blocks that never train, rounded to 8 bits in the model itself by torchao."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from peft_bsr.backbones import Column, probe_inputs, quiet, run_probe, tensors_of
from peft_bsr.core import is_quantized, kept_bytes
from peft_bsr.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from peft_bsr.ops import FrozenLinear, freeze_linear
from peft_bsr.tuners.classifier import without_layer

logger = logging.getLogger(__name__)

FrozenWeights = Literal["full", "int8"]
FROZEN_WEIGHTS_HELP = "'full', or 'int8': weights of frozen blocks are rounded to 8 bits in the model, for good."

_LARGEST_ERROR = 0.1  # of the outputs, by their norm; 1e-2 is usual
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"
_ROOT = "base_model.model."


def linears_to_round(
    model: nn.Module, column: Column, config: Any, trained: Collection[int], exact_roles: Collection[str] = ()
) -> list[str]:
    """Names of the Linear modules whose weights an adapter wants in 8 bits: those in blocks that do not train, or none.

    Args:
        model: The model.
        column: Its column.
        config: Of the adapter.
        trained: Indices of the blocks that train.
        exact_roles: Roles of leaf modules that stay as they are.
    """
    if config.frozen_weights == "full":
        return []
    names = [
        f"{block}.{leaf}"
        for index, block in enumerate(column.blocks)
        for role, leaf in zip(column.roles, column.leaves, strict=True)
        if index not in trained and role not in exact_roles
    ]
    return [name for name in names if type(without_layer(model.get_submodule(name))) in (nn.Linear, FrozenLinear)]


def check_rounded(model: nn.Module, column: Column, wanted: Sequence[str], has_others: bool) -> None:
    """Refuse an adapter that would run on other weights than those beside it, or than where it was trained.

    Args:
        model: The model.
        column: Its column.
        wanted: Modules that the adapter wants in 8 bits.
        has_others: Whether the model has adapters already.

    Raises:
        ConfigError: If it does.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, FrozenLinear)]
    if set(found) == set(wanted) or not (found or has_others):
        return
    blocks = {name: [i for i, b in enumerate(column.blocks) if name.startswith(f"{b}.")] for name in (*found, *wanted)}
    here, there = (sorted({i for name in names for i in blocks[name]}) for names in (found, wanted))
    raise ConfigError(
        f"the adapter wants the frozen weights of blocks {there} in 8 bits, but in this model those of blocks {here} "
        "are. All adapters of a model share its frozen weights: use the same `frozen_weights` and trained blocks, or "
        "load the model anew."
    )


@contextmanager
def tried_rounding(model: nn.Module, column: Column, names: Sequence[str]) -> Iterator[None]:
    """Round the modules for a while, and log what that does to the model's outputs.

    Args:
        model: The model.
        column: Its column.
        names: The modules, some or all of them rounded already.

    Raises:
        MissingDependencyError: If torchao is not installed.
        UnsupportedModelError: If outputs change by more than a tenth.
    """
    modules: list[Any] = [model.get_submodule(name) for name in names]
    modules = [module for module in modules if not isinstance(module, FrozenLinear)]
    if not modules:
        yield
        return
    inputs = probe_inputs(model, 1, column.image_shape)
    with quiet(model):
        expected = _floats(run_probe(model, inputs))
    originals = [(module, module.weight, module.weight.requires_grad) for module in modules]
    before = sum(kept_bytes(weight) for _, weight, _ in originals)
    _round(modules)
    try:
        with quiet(model):
            found = _floats(run_probe(model, inputs))
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        after = sum(kept_bytes(module.weight) for module in modules)
        logger.info(
            "%s: weights of %d frozen Linear modules in 8 bits take %.1f MiB instead of %.1f; outputs differ by %.1e",
            *(type(model).__name__, len(modules), after / 2**20, before / 2**20, error),
        )
        if not error <= _LARGEST_ERROR:
            raise UnsupportedModelError(
                f"{type(model).__name__}: with its frozen weights in 8 bits its outputs differ by {error:.0%}. Use "
                '`frozen_weights="full"`.'
            )
        yield
    finally:
        for module, weight, requires_grad in originals:
            module.__class__ = nn.Linear
            module.weight = weight.requires_grad_(requires_grad)


def round_weights(model: nn.Module, names: Sequence[str]) -> None:
    """Round the modules that are not rounded yet, for good.

    Args:
        model: The model.
        names: The modules.
    """
    _round([m for m in map(model.get_submodule, names) if type(m) is nn.Linear])


def tell_ddp(model: nn.Module, parked: Sequence[str] = ()) -> None:
    """Tell DistributedDataParallel which weights to leave alone, itself or under PEFT's model.

    Parked ones lie on the CPU, where it would refuse them beside others on accelerators; it cannot send rounded ones.

    Args:
        model: The model.
        parked: Names of its parked parameters.
    """
    names = [*parked, *(name for name, parameter in model.named_parameters() if is_quantized(parameter))]
    setattr(model, _IGNORED_BY_DDP, [*names, *(f"{_ROOT}{name}" for name in names)])
    if not names:
        delattr(model, _IGNORED_BY_DDP)


def _round(modules: Sequence[Any]) -> None:
    if not modules:
        return
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingDependencyError(
            '`frozen_weights="int8"` needs torchao, which cannot be imported here '
            f'({error}). Install it with `pip install peft-bsr[quantization]`, or use `frozen_weights="full"`.'
        ) from error
    for module in modules:
        module.weight.requires_grad_(False)
        quantize_(module, Int8WeightOnlyConfig())
        vars(module).pop("extra_repr", None)  # torchao's, bound to this very module, which a copy would call
        freeze_linear(module)


def _floats(output: Any) -> list[Tensor]:
    return [tensor.float() for tensor in tensors_of(output) if tensor.is_floating_point()]


__all__ = [
    "FROZEN_WEIGHTS_HELP",
    "FrozenWeights",
    "check_rounded",
    "linears_to_round",
    "round_weights",
    "tell_ddp",
    "tried_rounding",
]
