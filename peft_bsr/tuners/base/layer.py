"""Layers that run one adapter at a time, block controllers with one plan per adapter, and functions to find them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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
    """A tuner layer that runs one adapter at a time. Implements PEFT's calls on adapters (set, delete, status)."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active.

        Raises:
            AdapterError: If several adapters are named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_single(names, "activate")
        super().set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter. The model chooses which one is active next, because this layer may not have it."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]
        if adapter_name in self.active_adapters:
            self.set_adapter([])

    @property
    def carried_adapter(self) -> str | None:
        """The active adapter, if this layer is enabled and has it."""
        if self._disable_adapters or not self._active_adapter:
            return None
        name = self._active_adapter[0]
        return name if name in self._carried() else None

    def _carried(self) -> Mapping[str, object]:
        """The container with one entry per adapter. Read in each forward, so it avoids PEFT's search of all of them."""
        carried: Mapping[str, object] = getattr(self._modules[self.adapter_layer_names[0]], MODULES)
        return carried


class AdapterController(BlockController, SingleAdapterLayer):
    """A block controller with one plan per adapter. PEFT treats it as a tuner layer, but it has no base layer.

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
        """The plan of the active adapter, or None if adapters are disabled."""
        name = self.carried_adapter
        return None if name is None else self.plans[name]

    @property
    def weight(self) -> Tensor:
        """Raises AttributeError; PEFT's property would recurse without end, because there is no base layer."""
        raise AttributeError("a controller has no weight")

    bias = weight

    @property
    def read_layers(self) -> list[int]:
        """Blocks whose tokens the active adapter reads in addition to the model's forward, ascending."""
        return []

    def fetch_base(self) -> None:
        """Load the block's base weights, so that it can run with them."""

    def clear_base(self) -> None:
        """Load the block's base weights and end their offloading."""

    def _get_available_adapters(self) -> set[str]:
        return set(self.plans)

    def _carried(self) -> Mapping[str, object]:
        return self.plans

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        pass


def adapter_parts(model: nn.Module, adapter_name: str) -> list[tuple[str, nn.Module]]:
    """Full name and module of each part of an adapter in `model`, including its `modules_to_save`."""
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
    """The controllers of `model`, by block. Empty without an adapter of this package."""
    return sorted(
        (m for m in model.modules() if isinstance(m, AdapterController)), key=lambda controller: controller.index
    )


def find_backbone(model: nn.Module) -> nn.Module:
    """The vision transformer that an adapter is attached to: a part of the base model, or the base model itself."""
    controllers = find_controllers(model)
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return controllers[0].roots[0] if controllers else base


def runs_on_images(model: nn.Module) -> nn.Module:
    """The model, or the part with the adapter: a larger model around it takes more than images."""
    controllers = find_controllers(model)
    return find_backbone(model) if controllers and controllers[0].spec.part else model


@contextmanager
def detached(model: nn.Module, controllers: Sequence[AdapterController]) -> Iterator[None]:
    """Context manager: detach the controllers from the blocks."""
    roots = [controller.roots[0] for controller in controllers]
    for root, controller in zip(roots, controllers, strict=True):
        detach_controller(root, controller)
    try:
        yield
    finally:
        for root, controller in zip(roots, controllers, strict=True):
            attach_controller(root, controller)


def foreign_layers(model: nn.Module) -> list[str]:
    """Names of the layers that adapters of other methods have in the model."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return [name for name, layer in layers.items() if not isinstance(layer, SingleAdapterLayer)]


def leave_out_ours(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: object) -> None:
    """State dict hook of another method's PeftModel: PEFT 0.21 would save our adapters' weights with that method's."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SingleAdapterLayer)}
    ours = tuple(f"{prefix}{name}.{part}." for name, layer in layers.items() for part in layer.adapter_layer_names)
    for key in [key for key in state_dict if key.startswith(ours)]:
        del state_dict[key]


def check_single(adapter_names: list[str], action: str) -> None:
    """Raise if several adapters are named.

    Raises:
        AdapterError: If there are several.
    """
    if len(adapter_names) > 1:
        raise AdapterError(
            f"Cannot {action} {adapter_names} together: each adapter has its own weights and plan, which cannot be "
            "combined. Name one adapter."
        )


def drop_saved_name(layer: SingleAdapterLayer, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    """State dict hook: removes the adapter's name from keys of nested modules, which peft 0.20 would add twice."""
    (container,) = layer.adapter_layer_names
    adapters = getattr(layer, container)
    for key in [key for key in state_dict if key.startswith(f"{prefix}{container}.")]:
        name, _, parameter = key.removeprefix(f"{prefix}{container}.").partition(".")
        own = parameter_of(adapters[name], parameter) if name in adapters else parameter
        if own != parameter:
            state_dict[f"{prefix}{container}.{name}.{own}"] = state_dict.pop(key)


def parameter_of(module: nn.Module, parameter: str) -> str:
    """A parameter's name in `module`, without the adapter's name that peft 0.20 leaves in front of nested names."""
    names = {name for name, _ in module.named_parameters()}
    inner = parameter.partition(".")[2]
    return inner if parameter not in names and inner in names else parameter
