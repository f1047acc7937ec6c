"""Base tuner of methods that train copies or low-rank updates of blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

from peft import PeftConfig
from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec, StockRun, find_rule, probe, quiet, seed
from peft_bsr.compat.peft_api import AuxiliaryTrainingWrapper, ExcludedModule
from peft_bsr.core import ForwardContext
from peft_bsr.engine import CONTROLLER, Plan, attach_controller
from peft_bsr.errors import AdapterError, ReductionNotMergedWarning
from peft_bsr.selftest import verify_gradient_tokens, verify_lean, verify_plan, verify_stages
from peft_bsr.tuners.base.classifier import without_layer
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.frozen_weights import (
    check_rounded,
    in_one_dtype,
    linears_to_round,
    tell_ddp,
    tried_rounding,
)
from peft_bsr.tuners.base.layer import ROOT, SingleAdapterLayer, check_single, detached, find_controllers, parameter_of
from peft_bsr.tuners.base.loading import restore_requires_grad
from peft_bsr.tuners.base.reductions import allowed_modes
from peft_bsr.tuners.base.resolution import Resolution
from peft_bsr.tuners.base.tuner import MethodTuner
from peft_bsr.tuners.blocks.config import BlockConfig
from peft_bsr.tuners.blocks.layer import BlockWeights
from peft_bsr.tuners.blocks.targets import Way, is_excluded, resolve_targets


@dataclass(frozen=True)
class BlockResolution(Resolution):
    """What a method that trains blocks will do to a model.

    Attributes:
        targets: Name of each module that trains or is replaced -> how.
        layout: Canonical place -> name of each of them.
    """

    targets: Mapping[str, Way] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)

    @property
    def held(self) -> list[str]:
        """The targets."""
        return list(self.targets)


class BlockTuner(MethodTuner):
    """Trains copies or low-rank updates of modules in blocks, and of the final norm and the head."""

    prefix = "bsr_"
    needs_tokens: ClassVar[bool] = True  # whether models in which no token can be dropped are refused

    @classmethod
    def resolve(cls, model: nn.Module, config: Any) -> BlockResolution:
        """What attaching an adapter would do to the model. Runs all checks and does not change the model.

        Args:
            model: A supported vision transformer, with or without adapters of this method.
            config: Configuration of the adapter.

        Raises:
            UnsupportedModelError: If the model is not supported; the message gives the reason.
            ConfigError: If the model does not allow the configuration; the message names every problem.
        """
        controllers = find_controllers(model)
        spec, stock = (controllers[0].spec, None) if controllers else probe(model, cls.needs_tokens)
        cls._check_tokens(model, spec, config)
        with detached(model, controllers), _base_weights(model), cls._base_head(model):
            requested, targets, layout = resolve_targets(model, spec, config, cls._other_targets)
            with in_one_dtype(model):
                cls._verify(model, spec, requested, stock)
                plan = verify_plan(model, spec, requested, allowed_modes(config), stock)
                with _tried_updates(model, config, targets):
                    plan = _verified(model, spec, plan, stock)
                    verify_gradient_tokens(model, spec, plan, stock)
                rounded = linears_to_round(model, spec, config, plan.trained_blocks)
                check_rounded(model, spec, rounded, bool(controllers))
                with tried_rounding(model, spec, rounded):
                    crossed = [i for i, b in enumerate(plan.blocks) if b.saves_less and not b.trained]
                    if "int8" in rounded.values() and crossed:  # in bfloat16 they equal what autocast computes
                        lean = _verified(model, spec, plan, None, crossed[0]).blocks
                        blocks = (lean[i] if i in crossed else b for i, b in enumerate(plan.blocks))
                        plan = replace(plan, blocks=tuple(blocks))
        return BlockResolution(spec, plan, rounded, targets, layout)

    @classmethod
    def _base_head(cls, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager: the base model's head runs, even if an adapter replaces it."""
        return nullcontext()

    @classmethod
    def _check_tokens(cls, model: nn.Module, spec: ModelSpec, config: BlockConfig) -> None:
        """Raise an error if `config` drops tokens and the model cannot."""

    @classmethod
    def _other_targets(cls, model: nn.Module, spec: ModelSpec, config: BlockConfig, plan: Plan) -> dict[str, Way]:
        """Other modules that an adapter trains, by place. Called while the base model's head is active."""
        return {}

    @classmethod
    def _verify(cls, model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None) -> None:
        """Run the method's own checks on the model."""

    def _assign(self, model: nn.Module, adapter_name: str, given: SavedConfig, found: Any) -> None:
        controllers = self._attached_controllers(model, found.spec)
        for place, saved_name in (given.layout or {}).items():
            if (own_name := found.layout.get(place, saved_name)) != saved_name:
                saved = cast("BlockWeights", model.get_submodule(own_name))
                saved.saved_as[adapter_name] = found.spec.full_name(saved_name)
        for controller in controllers:
            controller.plans[adapter_name] = found.plan
            before = {name: p.requires_grad for name, p in controller.named_parameters()}
            controller.set_adapter(self.active_adapters)
            restore_requires_grad(controller, before)  # `given` need not be the active adapter's

    def _offloaded(self, model: nn.Module) -> list[str]:
        layers = [(n.removeprefix(ROOT), m) for n, m in model.named_modules() if isinstance(m, BlockWeights)]
        return [f"{name}.base_layer.{p}" for name, layer in layers for p, _ in layer.base_layer.named_parameters()]

    def _attached_controllers(self, model: nn.Module, spec: ModelSpec) -> list[Any]:
        """The controllers; the first adapter attaches them to the blocks."""
        if not find_controllers(model):
            context = ForwardContext()
            for index in range(spec.depth):
                attach_controller(model, self.controller_cls(index, spec, context, find_rule(model)))
        return find_controllers(model)

    def _check_target_module_exists(self, peft_config: BlockConfig, key: str) -> object:
        """Also matches a block if its controller, which may not exist yet, is a target."""
        key = peft_config.resolution.spec.local_name(key)
        if f"{key}.{CONTROLLER}" in peft_config.resolution.targets:
            return True
        if key.endswith(f".{CONTROLLER}"):
            return False
        return ExcludedModule() if is_excluded(peft_config, key) else key in peft_config.resolution.targets

    def _create_and_replace(
        self,
        peft_config: BlockConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer: Any = target
        found = peft_config.resolution
        current_key = found.spec.local_name(current_key)
        if f"{current_key}.{CONTROLLER}" in found.targets:
            backbone = self.model.get_submodule(found.spec.part or "")
            layer = self._attached_controllers(backbone, found.spec)[found.spec.blocks.index(current_key)]
            layer.update_layer(adapter_name, peft_config, target)
        else:
            if not isinstance(target, BlockWeights):
                layer = BlockWeights(target)
                setattr(parent, target_name, layer)
            way = found.targets.get(current_key)
            other = self._other_module(way, peft_config, layer)
            layer.update_layer(adapter_name, peft_config, low_rank=way == "low_rank", other=other)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _other_module(self, way: Way | None, config: BlockConfig, layer: BlockWeights) -> nn.Module | None:
        """The module that replaces a target which is neither copied nor updated."""
        return None

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge an adapter into the base modules. Token reduction stays active, so outputs do not change.

        Raises:
            AdapterError: If several adapters are named, or a weight is not finite (`safe_merge=True`).
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """Raise if an adapter cannot be merged, before any layer is merged."""
        names = list(adapter_names or self.active_adapters)
        check_single(names, "merge")
        if unknown := [name for name in names if name not in self.peft_config]:
            raise AdapterError(f"There is no adapter {unknown[0]!r}; this model has {sorted(self.peft_config)}.")
        if safe_merge and names:
            for layer in self.model.modules():
                if isinstance(layer, BlockWeights):
                    layer.check_finite(names[0])
        return names

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            names = self._check_merge(adapter_names, safe_merge)
            if names and self.reduces_in_evaluation and self.plan(names[0]).reduces:
                warnings.warn(
                    f"The merged model runs on all tokens: the token reduction of adapter {names[0]!r} is not part of "
                    "the weights. Keep the adapter to keep the reduction.",
                    ReductionNotMergedWarning,
                    stacklevel=3,
                )
        else:
            self._restore_base_modules()
        self._detach_controllers()
        tell_ddp(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, BlockWeights)]
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.weight_offload.clear(layer.base_layer, layer.device)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename keys to this model's names first: the file may be from another layout, or from peft 0.20."""
        own = {}
        for name, layer in model.named_modules():
            if isinstance(layer, SingleAdapterLayer) and adapter_name in getattr(layer, "bsr_params", ()):
                saved_name = layer.saved_as.get(adapter_name, name.removeprefix(ROOT))
                own[f"{ROOT}{saved_name}"] = (f"{ROOT}{name.removeprefix(ROOT)}", layer.bsr_params[adapter_name])
        renamed = {}
        for key, tensor in state_dict.items():
            name, separator, parameter = key.partition(".bsr_params.")
            if name in own:
                name, module = own[name]
                parameter = parameter_of(module, parameter)
            renamed[f"{name}{separator}{parameter}"] = tensor
        return cls._load_checked(model, config, adapter_name, renamed)

    def _restore_base_modules(self) -> None:
        """Unmerge, and remove PEFT's wrappers around `modules_to_save`, which would leave the trained modules."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BlockWeights) and module.merged:
                module.unmerge()
            elif isinstance(module, AuxiliaryTrainingWrapper):
                self.model.set_submodule(name, module.original_module)


def _verified(model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None, index: int | None = None) -> Plan:
    """The plan with the lean halves that passed, tried on one block, or where blocks differ on one of each kind."""
    if spec.no_reduction is not None:
        return verify_stages(model, spec, plan, stock)
    return verify_lean(model, spec, plan, stock, index)


@contextmanager
def _base_weights(model: nn.Module) -> Iterator[None]:
    """Context manager: the weights under trained copies are where the copies are, not offloaded."""
    layers = [module for module in model.modules() if isinstance(module, BlockWeights)]
    try:
        for layer in layers:
            layer.fetch_base()
        yield
    finally:
        for layer in layers:
            layer.place_base()


@contextmanager
def _tried_updates(model: nn.Module, config: BlockConfig, targets: Mapping[str, Way]) -> Iterator[None]:
    """Context manager: add small random low-rank updates where the adapter will have them."""
    places = {name: model.get_submodule(name) for name, way in targets.items() if way == "low_rank"}
    with quiet(model):
        seed(model)
        for name, module in places.items():
            layer: Any = BlockWeights(without_layer(module))
            layer.update_layer("tried", config, low_rank=True)
            # under PEFT's low_cpu_mem_usage it was made on the meta device
            update = layer.bsr_params["tried"].to_empty(device=next(layer.base_layer.parameters()).device)
            nn.init.normal_(update.lora_A, std=layer.in_features**-0.5)
            nn.init.normal_(update.lora_B, std=0.02)
            layer.set_adapter("tried")
            model.set_submodule(name, layer.eval())
    try:
        yield
    finally:
        for name, module in places.items():
            model.set_submodule(name, module)


__all__ = ["BlockResolution", "BlockTuner"]
