"""The tuner: puts SynQT beside a frozen vision transformer, the way PEFT expects."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

from peft import PeftConfig
from torch import Tensor, nn

from peft_bsr.backbones import Column, StockRun, default_state, find_rule, probe
from peft_bsr.core import ForwardContext
from peft_bsr.engine import Plan, QueryPath, attach_router
from peft_bsr.errors import AdapterError
from peft_bsr.ops import exact_parameters
from peft_bsr.selftest import verify_plan, verify_queries
from peft_bsr.tuners.base.classifier import find_classifier, find_final_norm
from peft_bsr.tuners.base.frozen_weights import (
    check_rounded,
    linears_to_round,
    round_weights,
    tell_ddp,
    tried_rounding,
)
from peft_bsr.tuners.base.reductions import allowed_modes, write_down
from peft_bsr.tuners.base.tuner import ROOT, RoutedTuner, detached, find_routers, parameter_of, warn_of_names
from peft_bsr.tuners.synqt.config import SynQTConfig, build_plan
from peft_bsr.tuners.synqt.layer import SynQTHead, SynQTRouter

_ROUTER_PLACE = re.compile(r".*\.(\d+)\.token_router")


class SynQTModel(RoutedTuner):
    """SynQT on a vision transformer with a classifier; made by `get_peft_model(model, SynQTConfig())`.

    All checks (the model's column, its classifier, the plan on this model, the query path against its own blocks) run
    before the first change.

    Args:
        model: A supported vision transformer, see `peft_bsr.probe_column`.
        config: The configuration.
        adapter_name: Name of the adapter, default `"default"`.

    Raises:
        UnsupportedModelError: With the reason that was found.
        ConfigError: Naming everything that this model does not allow.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), SynQTConfig(layers=[1, 3]))
        >>> model.base_model.layers()
        [1, 3]
    """

    prefix = "synqt_"
    router_cls = SynQTRouter

    def layers(self, adapter_name: str | None = None) -> list[int]:
        """The blocks that an adapter reads, default the active one.

        Raises:
            AdapterError: If there is none of that name.
        """
        self.plan(adapter_name)
        layers: list[int] = find_routers(self.model)[0].layers[adapter_name or self.active_adapters[0]]
        return layers

    @default_state()
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check everything, then give each block its router and the classifier its head."""
        self._check_place(model)
        warn_of_names(model, list(self.peft_config))
        config: SynQTConfig = copy.copy(self.peft_config[adapter_name])
        self._settled = self._settle(model, config, find_routers(model))
        write_down(config, self._settled[1])
        config.attached_to(model, *self._settled[:2], [self._settled[-1], *self._settled[0].unread])
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        round_weights(model, self._rounded)
        tell_ddp(model)
        self._set_modes()

    def _settle(
        self, model: nn.Module, config: SynQTConfig, routers: list[SynQTRouter]
    ) -> tuple[Column, Plan, QueryPath, list[int], str]:
        """What the model is and what will be done to it, checked on itself; nothing is changed."""
        stock: StockRun | None = None
        with _stock(model, routers):
            if routers:
                column = routers[0].column
            else:
                column, stock = probe(model)
            classifier = find_classifier(model, column, "the head of SynQT takes")
            requested, layers = build_plan(config, column)
            wanted = QueryPath(column, kept=config.kept_tokens)  # type: ignore[arg-type]
            path = verify_queries(model, column, layers[0], wanted, stock)
            plan = verify_plan(model, column, requested, allowed_modes(config), stock)
            self._rounded = linears_to_round(model, column, config, [], path.exact_roles)
            check_rounded(model, column, self._rounded, bool(routers))
            with tried_rounding(model, column, self._rounded):
                if self._rounded:
                    path = verify_queries(model, column, layers[0], path, None)
        return column, plan, path, layers, classifier

    def _settle_again(
        self, model: nn.Module, config: SynQTConfig, column: Column, plan: Plan, path: QueryPath, *rest: Any
    ) -> tuple[Any, ...]:
        """For a model without numbers, which cannot be checked: what was settled on its narrow twin."""
        self._rounded = linears_to_round(model, column, config, [], path.exact_roles)
        return column, plan, replace(path, column=column), *rest

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> bool:
        column, *_, classifier = self._settled
        return key in column.blocks or key == classifier

    def _create_and_replace(
        self,
        peft_config: SynQTConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        column, plan, path, layers, classifier = self._settled
        routers = {router.index: router for router in find_routers(self.model)}
        context = next(iter(routers.values())).context if routers else ForwardContext()
        if current_key == classifier:
            layer: Any = target if isinstance(target, SynQTHead) else SynQTHead(target, context)
            setattr(parent, target_name, layer)
            final_norm = find_final_norm(self.model, column)
            layer.update_layer(adapter_name, peft_config, column.width, len(layers), final_norm)
        else:
            index = column.blocks.index(current_key)
            if index not in routers:
                like = next(exact_parameters(target))
                routers[index] = SynQTRouter(index, column, context, find_rule(self.model), like)
                attach_router(self.model, routers[index])
            layer = routers[index]
            layer.update_layer(adapter_name, peft_config, plan, path, layers)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Refused: there is nothing to merge into.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            "SynQT cannot be merged: its queries and its head compute beside the backbone, whose weights they leave "
            "alone. Keep the adapter to use it, or call `unload()` for the base model."
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
        self._detach_routers()
        return super()._unload_and_optionally_merge(False, progressbar, safe_merge, adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """First to this model's names: the file may be from another layout of it, or from peft 0.20."""
        layers: dict[int | None, tuple[str, Any]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, (SynQTRouter, SynQTHead)) and adapter_name in layer.synqt_params:
                number = layer.index if isinstance(layer, SynQTRouter) else None
                layers[number] = f"{ROOT}{name.removeprefix(ROOT)}", layer.synqt_params[adapter_name]
        renamed = {}
        for key, tensor in state_dict.items():
            place, separator, parameter = key.partition(".synqt_params.")
            match = _ROUTER_PLACE.fullmatch(place)
            number = int(match[1]) if match else None
            if separator and number in layers:
                name, module = layers[number]
                key = f"{name}{separator}{parameter_of(module, parameter)}"
            renamed[key] = tensor
        return cls._load_checked(model, config, adapter_name, renamed)


@contextmanager
def _stock(model: nn.Module, routers: list[Any]) -> Iterator[None]:
    """Take the routers and the head off for a while."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, SynQTHead)}
    with detached(model, routers):
        for name, head in heads.items():
            model.set_submodule(name, head.base_layer)
        try:
            yield
        finally:
            for name, head in heads.items():
                model.set_submodule(name, head)
