"""A layer that runs one adapter at a time, a block's controller with one plan for each, and how they are found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_bsr.backbones import FamilyRule, ModelSpec
from peft_bsr.compat.peft_api import ModulesToSaveWrapper
from peft_bsr.compat.torch_api import MODULES
from peft_bsr.core import ForwardContext
from peft_bsr.engine import BlockController, Plan, attach_controller, detach_controller
from peft_bsr.errors import AdapterError

ROOT = "base_model.model."


class SingleAdapterLayer(BaseTunerLayer):
    """What PEFT's calls on adapters (set, delete, status) need from a layer that runs one adapter at a time."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Raises:
            AdapterError: If several are named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_single(names, "activate")
        super().set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter. Which one is active next is the model's choice: a layer may not carry it."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]
        if adapter_name in self.active_adapters:
            self.set_adapter([])

    @property
    def carried_adapter(self) -> str | None:
        """The active adapter, if this layer is enabled and carries it."""
        if self._disable_adapters or not self._active_adapter:
            return None
        name = self._active_adapter[0]
        return name if name in self._carried() else None

    def _carried(self) -> Any:
        """What has a place for each adapter; asked at each forward, so without PEFT's walk over all containers."""
        return getattr(self._modules[self.adapter_layer_names[0]], MODULES)


class AdapterController(BlockController, SingleAdapterLayer):
    """A block's controller with one plan per adapter. It has no base layer; PEFT calls it like a tuner layer.

    Args:
        index, spec, context, rule: See `BlockController`.
    """

    other_param_names: tuple[str, ...] = ("plans",)

    def __init__(self, index: int, spec: ModelSpec, context: ForwardContext, rule: FamilyRule) -> None:
        super().__init__(index, spec, context, rule)
        self.plans: dict[str, Plan] = {}
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def plan(self) -> Plan | None:
        """The active adapter's, or None where adapters are disabled."""
        name = self.carried_adapter
        return None if name is None else self.plans[name]

    @property
    def weight(self) -> Tensor:
        """There is none; PEFT's own look-up would call itself for ever on a layer without a base."""
        raise AttributeError("a controller has no weight")

    bias = weight

    @property
    def read_layers(self) -> list[int]:
        """Blocks whose tokens the active adapter reads beside the model's own forward, ascending."""
        return []

    def fetch_base(self) -> None:
        """Have the block's own weights where they run."""

    def clear_base(self) -> None:
        """Have the block's own weights where they run, for good."""

    def _get_available_adapters(self) -> set[str]:
        return set(self.plans)

    def _carried(self) -> Any:
        return self.plans

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        pass


def adapter_parts(model: nn.Module, adapter_name: str) -> list[tuple[str, nn.Module]]:
    """Full name and module of everything that an adapter has in `model`, its `modules_to_save` included."""
    parts = []
    for place, module in model.named_modules():
        containers: list[str] = []
        if isinstance(module, SingleAdapterLayer):
            containers = list(module.adapter_layer_names)
        elif isinstance(module, ModulesToSaveWrapper):
            containers = ["modules_to_save"]
        for container in containers:
            if adapter_name in (held := getattr(module, container, {})):
                parts.append((f"{place}.{container}.{adapter_name}".removeprefix("."), held[adapter_name]))
    return parts


def find_controllers(model: nn.Module) -> list[Any]:
    """The controllers of `model`, by block; empty without an adapter of ours."""
    return sorted(
        (m for m in model.modules() if isinstance(m, AdapterController)), key=lambda controller: controller.index
    )


@contextmanager
def detached(model: nn.Module, controllers: list[Any]) -> Iterator[None]:
    """Take the controllers off for a while."""
    for controller in controllers:
        detach_controller(model, controller)
    try:
        yield
    finally:
        for controller in controllers:
            attach_controller(model, controller)


def check_single(adapter_names: list[str], action: str) -> None:
    """Refuse several adapters at once.

    Raises:
        AdapterError: If there are.
    """
    if len(adapter_names) > 1:
        raise AdapterError(
            f"Cannot {action} {adapter_names} together: each of them holds whole weights and a plan, and two of them "
            "do not add up. Name one of them."
        )


def drop_saved_name(layer: Any, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """A hook: peft 0.20 saves a nested module's key with the adapter's name in it, and puts another in front again."""
    (container,) = layer.adapter_layer_names
    adapters = getattr(layer, container)
    for key in [key for key in state_dict if key.startswith(f"{prefix}{container}.")]:
        name, _, parameter = key.removeprefix(f"{prefix}{container}.").partition(".")
        own = parameter_of(adapters[name], parameter) if name in adapters else parameter
        if own != parameter:
            state_dict[f"{prefix}{container}.{name}.{own}"] = state_dict.pop(key)


def parameter_of(module: nn.Module, parameter: str) -> str:
    """A parameter's name in `module`, without the adapter's name that peft 0.20 leaves in front of a nested one."""
    names = {name for name, _ in module.named_parameters()}
    inner = parameter.partition(".")[2]
    return inner if parameter not in names and inner in names else parameter
