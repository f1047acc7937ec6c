"""The parameters that an adapter should train, read from its tuner layers and not from `requires_grad`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peft_bsr.compat.peft_api import ModulesToSaveWrapper
from peft_bsr.errors import AdapterError
from peft_bsr.tuners.base.layer import adapter_parts, find_controllers


@dataclass(frozen=True)
class TrainableGroup:
    """The active adapter's part of one tuner layer: one leaf module's copy, one mixture, one query synthesis, one head.

    Attributes:
        parameters: Full name -> parameter, only floating-point ones.
        block: Index of its block, or None before and after the blocks.
        is_named: Whether it belongs to `modules_to_save`: the model may not use some of its tensors (a mask token).
    """

    parameters: dict[str, nn.Parameter]
    block: int | None
    is_named: bool = False


def find_trainable_groups(model: nn.Module) -> list[TrainableGroup]:
    """The parameters that the active adapter of `model` should train: its layers and its `modules_to_save`.

    Raises:
        AdapterError: If there is no adapter of peft_bsr, or it is disabled.
    """
    controllers = find_controllers(model)
    if not controllers:
        raise AdapterError(
            f"{type(model).__name__} has no adapter of peft_bsr. Attach one with `get_peft_model(model, BSRConfig())`."
        )
    name = controllers[0].carried_adapter
    if name is None:
        raise AdapterError("the adapter is disabled: the base model runs, and nothing trains. Enable or activate it.")
    spec = controllers[0].spec
    blocks = [spec.full_name(block) for block in spec.blocks]
    wrappers = {place for place, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    groups = []
    for place, part in adapter_parts(model, name):
        parameters = {f"{place}.{n}": p for n, p in part.named_parameters() if p.is_floating_point()}
        block = next((i for i, block in enumerate(blocks) if f".{block}." in f".{place}."), None)
        groups.append(TrainableGroup(parameters, block, any(place.startswith(f"{w}.") for w in wrappers)))
    return [group for group in groups if group.parameters]


def of_adapters(model: nn.Module) -> set[int]:
    """Ids of the parameters of all adapters, active or not."""
    names = {name for controller in find_controllers(model) for name in controller.plans}
    return {id(p) for name in names for _, part in adapter_parts(model, name) for p in part.parameters()}


__all__ = ["TrainableGroup", "find_trainable_groups", "of_adapters"]
