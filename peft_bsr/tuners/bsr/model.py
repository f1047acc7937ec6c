"""The tuner: injects BSR into a vision transformer the way PEFT expects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_bsr.backbones import Column, default_state, find_rule, probe, quiet
from peft_bsr.core import ForwardContext
from peft_bsr.engine import ROUTER, Plan, attach_router
from peft_bsr.errors import AdapterError, ReductionNotMergedWarning
from peft_bsr.multitask import TaskHeads, new_head
from peft_bsr.selftest import verify_lean, verify_mixture, verify_plan
from peft_bsr.tuners.blocks.config import BlockConfig
from peft_bsr.tuners.blocks.layer import BSRWeights
from peft_bsr.tuners.bsr.router import BSRRouter, TaskSettings
from peft_bsr.tuners.blocks.targets import is_excluded, resolve_targets
from peft_bsr.tuners.base.classifier import find_classifier, find_final_norm, without_layer
from peft_bsr.tuners.base.frozen_weights import (
    check_rounded,
    in_one_dtype,
    linears_to_round,
    round_weights,
    tell_ddp,
    tried_rounding,
)
from peft_bsr.tuners.base.reductions import allowed_modes
from peft_bsr.tuners.base.tuner import ROOT, RoutedTuner, check_single, detached, find_routers, parameter_of, warn_of_names


class BSRModel(RoutedTuner):
    """BSR on a vision transformer; made by `get_peft_model(model, BSRConfig())`.

    All checks (the model's column, the plan on this model, exactness on a probe image) run before the first change.

    Args:
        model: A supported vision transformer, see `peft_bsr.probe_column`.
        config: The configuration.
        adapter_name: Name of the adapter, default `"default"`.

    Raises:
        UnsupportedModelError: With the reason that the probe found.
        ConfigError: Naming everything that this model does not allow.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from peft_bsr import BSRConfig
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig())
        >>> model.base_model.plan().trained_blocks
        [3]
    """

    prefix = "bsr_"
    router_cls = BSRRouter
    reduces_in_evaluation = True

    @default_state()
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check everything, put trained weights on the leaf modules, then give each block its plan."""
        self._check_place(model)
        routers = find_routers(model)
        for router in routers:
            router.fetch_base()  # checks run the base model, and a new adapter goes where its weights are
        warn_of_names(model, list(self.peft_config))
        config: BlockConfig = self.peft_config[adapter_name]
        column, plan, layout = self._settle(model, config, routers)
        self.peft_config[adapter_name] = self._write_down(model, column, config, plan, layout)
        self.peft_config[adapter_name].attached_to(model, column, plan, [*self._targets, *column.unread])
        self._column = column
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        routers = self._attached_routers(model, column)
        for place, saved_name in (config.layout or {}).items():
            if (own_name := layout.get(place, saved_name)) != saved_name:
                saved: Any = model.get_submodule(own_name)
                saved.saved_as[adapter_name] = saved_name
        self._hand_out(model, routers, adapter_name, plan)
        round_weights(model, self._rounded)
        for router in routers:
            router.set_adapter(self.active_adapters)
        self._set_modes()
        layers = [(name.removeprefix(ROOT), m) for name, m in model.named_modules() if isinstance(m, BSRWeights)]
        parked = [f"{name}.base_layer.{p}" for name, layer in layers for p, _ in layer.base_layer.named_parameters()]
        mlps = {id(module) for router in routers for module, _ in router.parked}
        parked += [f"{name}.{p}" for name, m in model.named_modules() if id(m) in mlps for p, _ in m.named_parameters()]
        tell_ddp(model, parked)

    def _settle(
        self, model: nn.Module, config: BlockConfig, routers: list[BSRRouter]
    ) -> tuple[Column, Plan, dict[str, str]]:
        """What the model is, what will be done to it, checked on itself, and the layout; nothing is changed."""
        column, stock = (routers[0].column, None) if routers else probe(model)
        classifier = None
        if getattr(config, "tasks", None):
            with detached(model, routers), _without_heads(model):
                classifier = find_classifier(model, column, "the heads of `tasks` take")
        requested, self._targets, layout = resolve_targets(model, column, config, classifier)
        with detached(model, routers), _without_heads(model), in_one_dtype(model):
            verify_mixture(model, column, requested, stock)
            plan = verify_plan(model, column, requested, allowed_modes(config), stock)
            with self._tried_updates(model, config):
                plan = verify_lean(model, column, plan, stock)
            self._rounded = linears_to_round(model, column, config, plan.trained_blocks)
            check_rounded(model, column, self._rounded, bool(routers))
            with tried_rounding(model, column, self._rounded):
                crossed = [i for i, b in enumerate(plan.blocks) if b.saves_less and not b.trained]
                if "int8" in self._rounded.values() and crossed:  # in bfloat16 they are what autocast makes of them
                    lean = verify_lean(model, column, plan, index=crossed[0]).blocks
                    plan = replace(
                        plan, blocks=tuple(lean[i] if i in crossed else b for i, b in enumerate(plan.blocks))
                    )
            return column, plan, layout

    @contextmanager
    def _tried_updates(self, model: nn.Module, config: BlockConfig) -> Iterator[None]:
        """Have low-rank updates, away from zero but small beside the weights, where they will be, for a while."""
        places = {name: model.get_submodule(name) for name, way in self._targets.items() if way == "low_rank"}
        with quiet(model):
            torch.manual_seed(0)
            for name, module in places.items():
                layer: Any = BSRWeights(without_layer(module))
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

    def _settle_again(
        self, model: nn.Module, config: BlockConfig, column: Column, plan: Plan, *_: Any
    ) -> tuple[Column, Plan, dict[str, str]]:
        """For a model without numbers, which cannot be checked: what was settled on its narrow twin."""
        self._targets, layout = resolve_targets(model, column, config)[1:]
        self._rounded = linears_to_round(model, column, config, plan.trained_blocks)
        return column, plan, layout

    def _attached_routers(self, model: nn.Module, column: Column) -> list[Any]:
        """The routers, put on the blocks by the first adapter."""
        if not find_routers(model):
            context = ForwardContext()
            for index in range(column.depth):
                attach_router(model, self.router_cls(index, column, context, find_rule(model)))
        return find_routers(model)

    def _hand_out(self, model: nn.Module, routers: list[BSRRouter], adapter_name: str, plan: Plan) -> None:
        """Give each block's router what it needs to follow the adapter's plan."""
        for router in routers:
            router.plans[adapter_name] = plan
        config: Any = self.peft_config[adapter_name]
        if getattr(config, "tasks", None):
            routers[0].detached(model)
            balance_weight = config.moe.balance_weight if config.moe else 0.0
            routers[0].calls[adapter_name] = TaskSettings(config.tasks, config.task_weights or {}, balance_weight)
            routers[0].attached(model)

    def _write_down(
        self, model: nn.Module, column: Column, config: BlockConfig, plan: Plan, layout: dict[str, str]
    ) -> BlockConfig:
        """The adapter's own copy of `config`."""
        return config.settled(plan, layout)

    def _check_target_module_exists(self, peft_config: BlockConfig, key: str) -> Any:
        if is_excluded(peft_config, key):
            return _ExcludedModule()
        if f"{key}.{ROUTER}" in self._targets:  # a block: its router, which may not be there yet, gets a mixture
            return True
        return key in self._targets and not key.endswith(f".{ROUTER}")

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
        if f"{current_key}.{ROUTER}" in self._targets:
            layer = self._attached_routers(self.model, self._column)[self._column.blocks.index(current_key)]
            layer.update_mixture(adapter_name, peft_config, target)
        else:
            if not isinstance(target, BSRWeights):
                layer = BSRWeights(target)
                setattr(parent, target_name, layer)
            way = self._targets.get(current_key)
            heads = self._new_heads(peft_config, layer) if way == "heads" else None
            layer.update_layer(adapter_name, peft_config, low_rank=way == "low_rank", heads=heads)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _new_heads(self, config: Any, layer: Any) -> TaskHeads:
        column, norm = self._column, find_final_norm(self.model, self._column)
        context = self._attached_routers(self.model, column)[0].context
        sizes = (layer.in_features, column.width, norm, column.num_prefix)
        return TaskHeads([new_head(task, *sizes) for task in config.tasks], config.tasks, context)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put an adapter's weights into the base modules. Token reduction stays in force, so outputs do not change.

        Raises:
            AdapterError: If several adapters are named, or a weight is not finite (`safe_merge=True`).
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """Refuse what cannot be merged before the first layer is."""
        names = list(adapter_names or self.active_adapters)
        check_single(names, "merge")
        if unknown := [name for name in names if name not in self.peft_config]:
            raise AdapterError(f"There is no adapter {unknown[0]!r}; this model has {sorted(self.peft_config)}.")
        if names and getattr(self.peft_config[names[0]], "tasks", None):
            raise AdapterError(
                f"Adapter {names[0]!r} cannot be merged: it has a head for each of its tasks"
                + (" and mixtures of experts" if self.peft_config[names[0]].moe else "")
                + ", which the base model has no place for. Keep the adapter; `export_task` writes one for a single "
                "task."
            )
        if safe_merge and names:
            for layer in self.model.modules():
                if isinstance(layer, BSRWeights):
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
        for router in find_routers(self.model):
            router.clear_base()
        self._detach_routers()
        tell_ddp(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, BSRWeights)]
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.parking.clear(layer.base_layer, layer.device)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """First to this model's names: the file may be from another layout, or from peft 0.20 (see `layer.py`)."""
        own = {}
        for name, layer in model.named_modules():
            if isinstance(layer, (BSRWeights, BSRRouter)) and adapter_name in layer.bsr_params:
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
        """Unmerge, and take off PEFT's wrappers around `modules_to_save`, which would leave the trained ones behind."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BSRWeights) and module.merged:
                module.unmerge()
            elif isinstance(module, AuxiliaryTrainingWrapper):
                self.model.set_submodule(name, module.original_module)


@contextmanager
def _without_heads(model: nn.Module) -> Iterator[None]:
    """The base model's own classifier runs for a while, in the place of the heads of several tasks."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BSRWeights) and not m.disable_adapters]
    layers = [layer for layer in layers if any(isinstance(m, TaskHeads) for m in layer.bsr_params.values())]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
