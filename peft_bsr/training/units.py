"""What an adapter means to train, read from its tuner layers: not from `requires_grad`, which may be what is wrong."""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from peft_bsr.errors import AdapterError
from peft_bsr.tuners.routed import SingleAdapterLayer, find_routers


@dataclass(frozen=True)
class Unit:
    """The active adapter's part of one tuner layer: one leaf module's copy, one mixture, one query synthesis, one head.

    Attributes:
        parameters: Full name -> parameter; those that are not floating-point are left out.
        block: Index of the block that it lies in, None in front of or behind them.
        is_named: Named as a whole in `modules_to_save`: the model may leave a tensor of it unread (a mask token).
    """

    parameters: dict[str, nn.Parameter]
    block: int | None
    is_named: bool = False


def find_units(model: nn.Module) -> list[Unit]:
    """What the active adapter of `model` means to train: its layers and its `modules_to_save`.

    Raises:
        AdapterError: If there is no adapter of peft_bsr, or it is disabled.
    """
    routers = find_routers(model)
    if not routers:
        raise AdapterError(
            f"{type(model).__name__} has no adapter of peft_bsr. Attach one with `get_peft_model(model, BSRConfig())`."
        )
    name = routers[0].carried_adapter
    if name is None:
        raise AdapterError("the adapter is disabled: the base model runs, and nothing trains. Enable or activate it.")
    blocks = routers[0].column.blocks
    units = []
    for place, module in model.named_modules():
        for path, part in _active_parts(module, name):
            prefix = f"{place}.{path}" if place else path
            parameters = {f"{prefix}.{n}": p for n, p in part.named_parameters() if p.is_floating_point()}
            block = next((i for i, block in enumerate(blocks) if f".{block}." in f".{place}."), None)
            units.append(Unit(parameters, block, isinstance(module, ModulesToSaveWrapper)))
    return [unit for unit in units if unit.parameters]


def of_adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters of all adapters, active or not."""
    found: set[int] = set()
    for module in model.modules():
        containers: list[nn.Module] = []
        if isinstance(module, BaseTunerLayer):
            containers = [getattr(module, c) for c in module.adapter_layer_names if hasattr(module, c)]
        elif isinstance(module, ModulesToSaveWrapper):
            containers = [module.modules_to_save]
        found |= {id(p) for container in containers for p in container.parameters()}
    return found


def _active_parts(module: nn.Module, adapter: str) -> list[tuple[str, nn.Module]]:
    if isinstance(module, SingleAdapterLayer):
        return [(f"{c}.{adapter}", getattr(module, c)[adapter]) for c in _containers(module, adapter)]
    if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        return [(f"modules_to_save.{adapter}", module.modules_to_save[adapter])]
    return []


def _containers(layer: SingleAdapterLayer, adapter: str) -> list[str]:
    return [name for name in layer.adapter_layer_names if adapter in getattr(layer, name, {})]


__all__ = ["Unit", "find_units", "of_adapters"]
