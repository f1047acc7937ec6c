"""Base class of all tuners: one active adapter, one controller per block."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_bsr.backbones import ModelSpec, default_state, main_input
from peft_bsr.deprecation import warn_renamed
from peft_bsr.engine import Plan, detach_controller, explain_blocks
from peft_bsr.errors import AdapterError, AdapterNameWarning, AdapterSwitchedWarning
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.files import check_file
from peft_bsr.tuners.base.frozen_weights import round_weights, tell_ddp
from peft_bsr.tuners.base.inputs import check_inputs
from peft_bsr.tuners.base.layer import (
    AdapterController,
    SingleAdapterLayer,
    check_single,
    find_controllers,
    foreign_layers,
)
from peft_bsr.tuners.base.loading import FileChecks
from peft_bsr.tuners.base.part import beside_others, check_beside, resolve_part
from peft_bsr.tuners.base.resolution import Resolution


class MethodTuner(FileChecks):
    """A tuner whose adapters each have a plan for the blocks. One adapter is active at a time."""

    tuner_layer_cls = SingleAdapterLayer
    controller_cls: ClassVar[type[AdapterController]]
    reduces_in_evaluation: ClassVar[bool] = True  # whether tokens are dropped in evaluation, too
    merges: ClassVar[bool] = True  # whether the trained weights can be merged into the base model
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        with beside_others(model, peft_config) as base:
            super().__init__(base, peft_config, adapter_name, *args, **kwargs)

    @property
    def part(self) -> str | None:
        """Name of the part of the model that the adapters are attached to. None = the model itself."""
        return next((config.part for config in self.peft_config.values() if config.attachment is not None), None)

    @property
    def backbone(self) -> nn.Module:
        """The vision transformer: the part of the model that the adapters are attached to, or the model itself."""
        controllers = find_controllers(self.model)
        return controllers[0].roots[0] if controllers else self.model.get_submodule(self.part or "")

    def plan(self, adapter_name: str | None = None) -> Plan:
        """The plan of an adapter. Default None: the active adapter.

        Raises:
            AdapterError: If there is no adapter of that name.
        """
        name = adapter_name or (self.active_adapters or [None])[0]
        controllers = find_controllers(self.model)
        if not controllers or name not in controllers[0].plans:
            raise AdapterError(f"There is no adapter {name!r}; this model has {sorted(self.peft_config)}.")
        return controllers[0].plans[name]

    @classmethod
    def resolve(cls, model: nn.Module, config: SavedConfig) -> Resolution:
        """What attaching an adapter would do to the model. Runs all checks and does not change the model.

        Args:
            model: A supported vision transformer, with or without adapters of this method.
            config: Configuration of the adapter.

        Raises:
            UnsupportedModelError: If the model is not supported; the message gives the reason.
            ConfigError: If the model does not allow the configuration; the message names every problem.
        """
        raise NotImplementedError(f"{cls.__name__} does not implement `resolve`")

    @default_state()
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Run all checks, then attach the adapter. The first one stores `requires_grad` of all parameters.

        Raises:
            AdapterError: If the model is wrapped by a tuner, or has adapters of another method.
            UnsupportedModelError, ConfigError: See `resolve`.
        """
        given = self.peft_config[adapter_name]
        self._check_place(model, given)
        warn_of_names(model, list(self.peft_config))
        for controller in find_controllers(model):
            controller.fetch_base()  # checks run the base model; new adapters go to the device of its weights
        found: Resolution = given.resolution or resolve_part(type(self), model, given)
        backbone = model.get_submodule(found.spec.part or "")
        check_beside(model, backbone, adapter_name, is_first=len(self.peft_config) == 1)
        config = self._record(backbone, given, found)
        held = [*found.held, *found.spec.unread]
        config.attached_to(backbone, found.spec, found.plan, held, self._known_fingerprint(adapter_name))
        config.resolution = found  # PEFT passes the configuration to the methods that it calls
        self.peft_config[adapter_name] = config
        if "_requires_grad" not in self.__dict__:
            self._requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.__dict__.pop("_controllers", None)
        with self._undone_on_error(adapter_name):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            config.resolution = None
            self._assign(backbone, adapter_name, given, found)
        round_weights(backbone, found.rounded)
        self._set_modes()
        tell_ddp(model, self._offloaded(model))

    def _record(self, model: nn.Module, config: SavedConfig, found: Resolution) -> SavedConfig:
        """The adapter's copy of `config`, with the values that were chosen for the model."""
        return config.recorded(found)

    def _assign(self, model: nn.Module, adapter_name: str, given: SavedConfig, found: Resolution) -> None:
        """Set what controllers and layers of the backbone need for the adapter's plan. Called after they are made."""

    def _offloaded(self, model: nn.Module) -> list[str]:
        """Names of parameters that are offloaded to the CPU while they are not used."""
        return []

    @property
    def controllers(self) -> list[Any]:
        """The controllers of the model's blocks, by block. Cached, because it is read in each forward."""
        found = self.__dict__.get("_controllers")
        if not found:
            found = self.__dict__["_controllers"] = find_controllers(self.model)
        return found

    @property
    def spec(self) -> ModelSpec:
        """Description of the model, from `probe_model`."""
        return find_controllers(self.model)[0].spec

    @property
    def column(self) -> ModelSpec:
        """Old name of `spec`."""
        warn_renamed("base_model.column", "base_model.spec")
        return self.spec

    def explain(self) -> str:
        """One line per block: its plan, what is active, and the reason if the two differ. First the part, if any."""
        controllers = find_controllers(self.model)
        found = explain_blocks([(r.roots[0].get_submodule(r.spec.blocks[r.index]), r) for r in controllers])
        return found if self.part is None else f"part: {self.part}\n{found}"

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active: its weights, its plan and its head.

        Raises:
            AdapterError: If several adapters are named.
        """
        check_single([adapter_name] if isinstance(adapter_name, str) else list(adapter_name), "activate")
        with self._own_part():
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_modes()

    def enable_adapter_layers(self) -> None:
        """Enable adapters."""
        with self._own_part():
            super().enable_adapter_layers()
        self._set_modes()

    def disable_adapter_layers(self) -> None:
        """Disable adapters: the model runs as the base model."""
        with self._own_part():
            super().disable_adapter_layers()
        self._set_modes()

    def _set_modes(self) -> None:
        """Set each block's training mode by the active plan."""
        for controller in find_controllers(self.model):
            block = controller.roots[0].get_submodule(controller.spec.blocks[controller.index])
            block.train(block.training)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others becomes active, on every layer."""
        was_active = adapter_name in self.active_adapters
        active = list(self.active_adapters)
        with self._own_part():
            super().delete_adapter(adapter_name)
        if not was_active:
            self.active_adapter = active
        elif self.peft_config:
            following = next(iter(self.peft_config))
            warnings.warn(
                f"Adapter {adapter_name!r} was active and is deleted; {following!r} is active now.",
                AdapterSwitchedWarning,
                stacklevel=2,
            )
            self.set_adapter(following)

    def _detach_controllers(self) -> None:
        """Detach the controllers from the blocks permanently."""
        self.__dict__.pop("_controllers", None)
        for controller in find_controllers(self.model):
            controller.clear_base()
            root = controller.roots[0]
            block = root.get_submodule(controller.spec.blocks[controller.index])
            detach_controller(root, controller)
            block.train(block.training)

    @contextmanager
    def _own_part(self) -> Iterator[None]:
        """Context manager: PEFT's loops over the modules of `self.model` leave adapters of other methods alone."""
        whole = self.model
        if foreign_layers(whole):
            self.model = self.backbone
        try:
            yield
        finally:
            self.model = whole

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base modules."""
        with self._own_part():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`."""
        with self._own_part():
            super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        whole, others = self.model, foreign_layers(self.model)
        configs = getattr(whole, "peft_config", {})
        with self._own_part():
            super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if others:
            vars(whole)["peft_config"] = {n: c for n, c in configs.items() if c is not self.peft_config.get(n)}
        return whole

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze everything else; beside adapters of other methods only the part."""
        super()._mark_only_adapters_as_trainable(self.backbone if foreign_layers(model) else model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Does not copy `weight` as PEFT does, because a LayerScale or a pooling head has none."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT expects the adapter's name right before the last part of the key, but our modules are nested."""
        return key.replace(f".{cls.prefix}params.{adapter_name}.", f".{cls.prefix}params.")

    def _check_place(self, model: nn.Module, config: SavedConfig) -> None:
        """Raise if the model has other tuners, or if the adapter's file does not match its settings.

        Raises:
            AdapterError: If the model is wrapped by a tuner, or has adapters of another method.
            AdapterFileError: See `check_file`.
        """
        if isinstance(model, (PeftModel, BaseTuner)):
            raise AdapterError(
                f"{type(model).__name__} already has adapters; add another with "
                "`model.add_adapter(name, config)`. To start from the base model, call `model.unload()` first."
            )
        if others := {type(controller).__name__ for controller in find_controllers(model)} - {
            self.controller_cls.__name__
        }:
            raise AdapterError(
                f"{type(model).__name__} has adapters of another method ({', '.join(sorted(others))}). Call "
                "`unload()` on it first, or load the base model again."
            )
        if config.fills_weights:
            check_file(config)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: object, **kwargs: object) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                f"`adapter_names={kwargs['adapter_names']!r}` asks for several adapters in one batch, but each adapter "
                "has its own blocks and token counts. Use `set_adapter` and one batch per adapter."
            )
        named = [name for name in ("task", "task_ids") if kwargs.get(name) is not None]
        controllers = self.controllers
        if named and not any(getattr(controller, "calls", None) for controller in controllers):
            raise AdapterError(
                f"`{named[0]}={kwargs[named[0]]!r}` was given, but no adapter of this model has tasks. Attach one with "
                "`BSRConfig(tasks={name: number of classes})`, or leave it out."
            )
        is_encoded = kwargs.get("encoder_outputs") is not None  # only the decoder runs
        if controllers and controllers[0].context.now.resume_point is None and self.part is None and not is_encoded:
            check_inputs(main_input(self.model), controllers[0].spec, args, kwargs)
        try:
            yield
        except BaseException:  # for example an interrupt, after which the model's forward hooks do not run
            if controllers:
                controllers[0].context.now.clear()
            raise


def warn_of_names(model: nn.Module, adapter_names: list[str]) -> None:
    """Warn of names that are part of a module's name: PEFT would leave keys out when it saves another adapter."""
    names = (re.split(r"\.(?:\w+_params|modules_to_save)\.", name)[0] for name, _ in model.named_modules())
    parts = {part for name in names for part in name.split(".")}
    if len(adapter_names) > 1 and (clashing := [name for name in adapter_names if name in parts]):
        warnings.warn(
            f"Adapters {clashing} have the same names as modules of this model. Running them is safe, but a saved file "
            "of another adapter would lack its weights in these modules. Save under other names.",
            AdapterNameWarning,
            stacklevel=2,
        )
