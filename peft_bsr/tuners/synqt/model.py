"""The tuner of SynQT."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from peft import PeftConfig
from torch import Tensor, nn

from peft_bsr.backbones import find_rule, probe
from peft_bsr.core import ForwardContext
from peft_bsr.engine import QueryPath, attach_controller
from peft_bsr.errors import AdapterError
from peft_bsr.ops import exact_parameters
from peft_bsr.selftest import verify_plan, verify_queries
from peft_bsr.tuners.base.classifier import find_classifier, find_final_norm
from peft_bsr.tuners.base.frozen_weights import check_rounded, linears_to_round, tried_rounding
from peft_bsr.tuners.base.layer import ROOT, AdapterController, detached, find_controllers, parameter_of
from peft_bsr.tuners.base.reading import ReadingTuner
from peft_bsr.tuners.base.reductions import allowed_modes
from peft_bsr.tuners.base.resolution import Resolution
from peft_bsr.tuners.synqt.config import SynQTConfig, build_plan
from peft_bsr.tuners.synqt.layer import SynQTController, SynQTHead

_CONTROLLER_PLACE = re.compile(r".*\.(\d+)\.token_router")


@dataclass(frozen=True)
class SynQTResolution(Resolution):
    """What SynQT will do to a model.

    Attributes:
        path: How blocks are read.
        layers: Indices of the blocks that are read, ascending.
        classifier: Name of the module that its head replaces.
    """

    path: QueryPath
    layers: tuple[int, ...]
    classifier: str

    @property
    def held(self) -> list[str]:
        """The classifier."""
        return [self.classifier]

    @property
    def exact_names(self) -> Collection[str]:
        """Keys and values, which are absorbed."""
        return self.path.exact_names

    def with_width(self, width: int) -> SynQTResolution:
        """The same for a model of that width."""
        found = super().with_width(width)
        return replace(found, path=replace(self.path, spec=found.spec))


class SynQTModel(ReadingTuner):
    """SynQT on a vision transformer with a classifier; made by `get_peft_model(model, SynQTConfig())`.

    All checks (probe of the model, its classifier, its plan, the query path compared with the blocks) run before the
    model is changed.

    Args:
        model: A supported vision transformer, see `peft_bsr.probe_model`.
        config: The configuration.
        adapter_name: Name of the adapter, default `"default"`.

    Raises:
        UnsupportedModelError: If the model is not supported; the message gives the reason.
        ConfigError: If the model does not allow the configuration; the message names every problem.

    Examples:
        >>> from peft import get_peft_model
        >>> from peft_bsr import SynQTConfig
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), SynQTConfig(layers=[1, 3]))
        >>> model.base_model.layers()
        [1, 3]
    """

    prefix = "synqt_"
    controller_cls = SynQTController

    @classmethod
    def resolve(cls, model: nn.Module, config: Any) -> SynQTResolution:
        """What attaching an adapter would do to the model. Runs all checks and does not change the model.

        Args:
            model: A supported vision transformer with a classifier, with or without adapters of SynQT.
            config: Configuration of the adapter.

        Raises:
            UnsupportedModelError: If the model is not supported; the message gives the reason.
            ConfigError: If the model does not allow the configuration; the message names every problem.
        """
        controllers = find_controllers(model)
        with _stock(model, controllers):
            spec, stock = (controllers[0].spec, None) if controllers else probe(model)
            classifier = find_classifier(model, spec, "the head of SynQT takes")
            requested, layers = build_plan(config, spec)
            path = verify_queries(model, spec, layers[0], QueryPath(spec, kept=config.kept_tokens), stock)
            plan = verify_plan(model, spec, requested, allowed_modes(config), stock)
            rounded = linears_to_round(model, spec, config, [], path.exact_names)
            check_rounded(model, spec, rounded, bool(controllers))
            if rounded:
                with tried_rounding(model, spec, rounded):
                    path = verify_queries(model, spec, layers[0], path, None)
        return SynQTResolution(spec, plan, rounded, path, tuple(layers), classifier)

    def _check_target_module_exists(self, peft_config: SynQTConfig, key: str) -> bool:
        found: SynQTResolution = peft_config.resolution
        return key in found.spec.blocks or key == found.classifier

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
        found: SynQTResolution = peft_config.resolution
        spec = found.spec
        controllers = {controller.index: controller for controller in find_controllers(self.model)}
        context = next(iter(controllers.values())).context if controllers else ForwardContext()
        if current_key == found.classifier:
            layer: Any = target if isinstance(target, SynQTHead) else SynQTHead(target, context)
            setattr(parent, target_name, layer)
            final_norm = find_final_norm(self.model, spec)
            layer.update_layer(adapter_name, peft_config, spec.width, len(found.layers), final_norm)
        else:
            index = spec.blocks.index(current_key)
            if index not in controllers:
                like = next(exact_parameters(target))
                controllers[index] = SynQTController(index, spec, context, find_rule(self.model), like)
                attach_controller(self.model, controllers[index])
            layer = controllers[index]
            layer.update_layer(adapter_name, peft_config, found.plan, found.path, list(found.layers))
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Not supported, because there are no weights to merge into.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            "SynQT cannot be merged: its queries and its head compute in addition to the backbone and do not change "
            "its weights. Keep the adapter to use it, or call `unload()` for the base model."
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
        self._detach_controllers()
        return super()._unload_and_optionally_merge(False, progressbar, safe_merge, adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename keys to this model's names first: the file may be from another layout, or from peft 0.20."""
        layers: dict[int | None, tuple[str, nn.Module]] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, (SynQTController, SynQTHead)) and adapter_name in layer.synqt_params:
                number = layer.index if isinstance(layer, SynQTController) else None
                layers[number] = f"{ROOT}{name.removeprefix(ROOT)}", layer.synqt_params[adapter_name]
        renamed = {}
        for key, tensor in state_dict.items():
            place, separator, parameter = key.partition(".synqt_params.")
            match = _CONTROLLER_PLACE.fullmatch(place)
            number = int(match[1]) if match else None
            if separator and number in layers:
                name, module = layers[number]
                key = f"{name}{separator}{parameter_of(module, parameter)}"
            renamed[key] = tensor
        return cls._load_checked(model, config, adapter_name, renamed)


@contextmanager
def _stock(model: nn.Module, controllers: Sequence[AdapterController]) -> Iterator[None]:
    """Context manager: detach the controllers and the head."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, SynQTHead)}
    with detached(model, controllers):
        for name, head in heads.items():
            model.set_submodule(name, head.base_layer)
        try:
            yield
        finally:
            for name, head in heads.items():
                model.set_submodule(name, head)
