"""The tuner: injects BSR into a vision transformer the way PEFT expects."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_bsr.backbones import Column, find_rule, probe
from peft_bsr.core import RouteCarrier
from peft_bsr.engine import Plan, attach_router, detach_router, verify_lean, verify_plan
from peft_bsr.errors import AdapterError, AdapterNameWarning, ReductionNotMergedWarning
from peft_bsr.tuners.block_config import BlockConfig
from peft_bsr.tuners.bsr.layer import BSRLayer, BSRRouter, BSRWeights, check_single
from peft_bsr.tuners.bsr.targets import is_excluded, resolve_targets

ROOT = "base_model.model."
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


class BSRModel(BaseTuner):
    """BSR on a vision transformer; made by `get_peft_model(model, BSRConfig())`.

    All checks (the model's column, the plan on this model, exactness on a probe image) run before the first change.

    Args:
        model: A supported vision transformer, see `peft_bsr.probe_column`.
        config: The configuration.
        adapter_name: Name of the adapter, default `"default"`.

    Raises:
        UnsupportedModelError: With the reason that the probe found.
        ConfigError: Naming everything that this model does not allow.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig())
        >>> model.base_model.plan().trained_blocks
        [3]
    """

    prefix = "bsr_"
    router_cls: ClassVar[type[BSRRouter]] = BSRRouter
    reduces_in_evaluation = True
    tuner_layer_cls = BSRLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def plan(self, adapter_name: str | None = None) -> Plan:
        """The plan of an adapter, default the active one.

        Raises:
            AdapterError: If there is none of that name.
        """
        name = adapter_name or (self.active_adapters or [None])[0]
        routers = find_routers(self.model)
        if not routers or name not in routers[0].bsr_plans:
            raise AdapterError(f"There is no adapter {name!r}; this model has {sorted(self.peft_config)}.")
        return routers[0].bsr_plans[name]

    @property
    def column(self) -> Column:
        """What the probe found."""
        return find_routers(self.model)[0].column

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check everything, put trained weights on the leaf modules, then give each block its plan."""
        routers = find_routers(model)
        _warn_of_names(model, list(self.peft_config))
        config: BlockConfig = self.peft_config[adapter_name]
        column, plan, layout = self._settle(model, config, routers)
        self.peft_config[adapter_name] = self._write_down(model, column, config, plan, layout)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for place, saved_name in (config.layout or {}).items():
            if (own_name := layout.get(place, saved_name)) != saved_name:
                layer: Any = model.get_submodule(own_name)
                layer.saved_as[adapter_name] = saved_name
        if not routers:
            carrier = RouteCarrier()
            routers = [self.router_cls(index, column, carrier, find_rule(model)) for index in range(column.depth)]
            for router in routers:
                attach_router(model, router)
        self._hand_out(model, routers, adapter_name, plan)
        for router in routers:
            router.set_adapter(self.active_adapters)
        self._set_modes()
        # parked weights lie on the CPU, where DistributedDataParallel would refuse them beside others on accelerators
        layers = [(name.removeprefix(ROOT), m) for name, m in model.named_modules() if isinstance(m, BSRWeights)]
        parked = [f"{name}.base_layer.{p}" for name, layer in layers for p, _ in layer.base_layer.named_parameters()]
        setattr(model, _IGNORED_BY_DDP, [*parked, *(f"{ROOT}{name}" for name in parked)])

    def _settle(
        self, model: nn.Module, config: BlockConfig, routers: list[BSRRouter]
    ) -> tuple[Column, Plan, dict[str, str]]:
        """What the model is, what will be done to it, checked on itself, and the layout; nothing is changed."""
        column, stock = (routers[0].column, None) if routers else probe(model)
        requested, self._targets, layout = resolve_targets(model, column, config)
        with _detached(model, routers):
            plan = verify_plan(model, column, requested, config.allowed_modes(), stock)
            return column, verify_lean(model, column, plan, stock), layout

    def _hand_out(self, model: nn.Module, routers: list[BSRRouter], adapter_name: str, plan: Plan) -> None:
        """Give each block's router what it needs to follow the adapter's plan."""
        for router in routers:
            router.bsr_plans[adapter_name] = plan

    def _write_down(
        self, model: nn.Module, column: Column, config: BlockConfig, plan: Plan, layout: dict[str, str]
    ) -> BlockConfig:
        """The adapter's own copy of `config`."""
        return config.settled(plan, layout)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: BlockConfig, key: str) -> Any:
        if is_excluded(peft_config, key):
            return _ExcludedModule()
        return key in self._targets

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
        if not isinstance(target, BSRWeights):
            layer = BSRWeights(target)
            setattr(parent, target_name, layer)
            target = layer
        target.update_layer(adapter_name, peft_config, low_rank=self._targets.get(current_key, False))
        target.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active: its weights, its plan, its head.

        Raises:
            AdapterError: If several are named.
        """
        check_single([adapter_name] if isinstance(adapter_name, str) else list(adapter_name), "activate")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_modes()

    def enable_adapter_layers(self) -> None:
        """Switch adapters on."""
        super().enable_adapter_layers()
        self._set_modes()

    def disable_adapter_layers(self) -> None:
        """Switch adapters off: the model is the base model."""
        super().disable_adapter_layers()
        self._set_modes()

    def _set_modes(self) -> None:
        """Training mode in each block as the plan in force has it."""
        for router in find_routers(self.model):
            block = self.model.get_submodule(router.column.blocks[router.index])
            block.train(block.training)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, the first of the others becomes active, on every layer."""
        was_active = adapter_name in self.active_adapters
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if not was_active:
            self.active_adapter = active
        elif self.peft_config:
            following = next(iter(self.peft_config))
            warnings.warn(
                f"Adapter {adapter_name!r} was active and is deleted; {following!r} is active now.", stacklevel=2
            )
            self.set_adapter(following)

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
            block = self.model.get_submodule(router.column.blocks[router.index])
            detach_router(self.model, router)
            block.train(block.training)
        delattr(self.model, _IGNORED_BY_DDP)
        layers = [module for module in self.model.modules() if isinstance(module, BSRWeights)]
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            layer.parking.clear(layer.base_layer, layer.device)
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own copies a `weight`, which a LayerScale or a pooling head does not have."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's own expects the name right before the last part of the key; a pooling head's modules are nested."""
        return key.replace(f".bsr_params.{adapter_name}.", ".bsr_params.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """First to this model's names: the file may be from another layout, or from peft 0.20 (see `layer.py`)."""
        own = {}
        for name, layer in model.named_modules():
            if isinstance(layer, BSRWeights) and adapter_name in layer.bsr_params:
                saved_name = layer.saved_as.get(adapter_name, name.removeprefix(ROOT))
                own[f"{ROOT}{saved_name}"] = (f"{ROOT}{name.removeprefix(ROOT)}", layer.bsr_params[adapter_name])
        renamed = {}
        for key, tensor in state_dict.items():
            name, separator, parameter = key.partition(".bsr_params.")
            if name in own:
                name, module = own[name]
                names = {n for n, _ in module.named_parameters()}
                inner = parameter.partition(".")[2]
                parameter = inner if parameter not in names and inner in names else parameter
            renamed[f"{name}{separator}{parameter}"] = tensor
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

    def _restore_base_modules(self) -> None:
        """Unmerge, and take off PEFT's wrappers around `modules_to_save`, which would leave the trained ones behind."""
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BSRWeights) and module.merged:
                module.unmerge()
            elif isinstance(module, AuxiliaryTrainingWrapper):
                self.model.set_submodule(name, module.original_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                f"`adapter_names={kwargs['adapter_names']!r}` asks for several adapters in one batch, but each BSR "
                "adapter has blocks and token counts of its own. Use `set_adapter` and one batch for each."
            )
        yield


def find_routers(model: nn.Module) -> list[BSRRouter]:
    """The routers of `model`, by block; empty without an adapter of ours."""
    return sorted((m for m in model.modules() if isinstance(m, BSRRouter)), key=lambda router: router.index)


@contextmanager
def _detached(model: nn.Module, routers: list[BSRRouter]) -> Iterator[None]:
    """Take the routers off for a while."""
    for router in routers:
        detach_router(model, router)
    try:
        yield
    finally:
        for router in routers:
            attach_router(model, router)


def _warn_of_names(model: nn.Module, adapter_names: list[str]) -> None:
    """Saving one of several adapters, PEFT leaves out every key that holds the name of another, silently."""
    names = (re.split(r"\.(?:bsr_params|modules_to_save)\.", name)[0] for name, _ in model.named_modules())
    parts = {part for name in names for part in name.split(".")}
    if len(adapter_names) > 1 and (clashing := [name for name in adapter_names if name in parts]):
        warnings.warn(
            f"Adapters {clashing} are called like modules of this model. Running them is safe, but saving another "
            "adapter beside them would leave out its weights of those modules. Save under other names.",
            AdapterNameWarning,
            stacklevel=2,
        )
