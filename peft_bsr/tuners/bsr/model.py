"""The tuner of BSR, with its tasks and its mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from peft_bsr.backbones import ModelSpec, StockRun
from peft_bsr.compat.peft_api import disabled_layers
from peft_bsr.engine import CONTROLLER, Plan
from peft_bsr.errors import AdapterError, ConfigError, UnsupportedModelError
from peft_bsr.multitask import TaskHeads, new_head
from peft_bsr.selftest import verify_mixture
from peft_bsr.tuners.base.classifier import find_classifier, find_final_norm
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.resolution import Resolution
from peft_bsr.tuners.blocks.config import BlockConfig
from peft_bsr.tuners.blocks.layer import BlockWeights
from peft_bsr.tuners.blocks.targets import Way
from peft_bsr.tuners.blocks.tuner import BlockTuner
from peft_bsr.tuners.bsr.config import BSRConfig
from peft_bsr.tuners.bsr.controller import BSRController, TaskSettings


class BSRModel(BlockTuner):
    """BSR on a vision transformer; made by `get_peft_model(model, BSRConfig())`.

    All checks (probe of the model, its plan, exactness on a probe image) run before the model is changed.

    Args:
        model: A supported vision transformer, see `peft_bsr.probe_model`.
        config: The configuration.
        adapter_name: Name of the adapter, default `"default"`.

    Raises:
        UnsupportedModelError: If the model is not supported; the message gives the reason.
        ConfigError: If the model does not allow the configuration; the message names every problem.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> from peft_bsr import BSRConfig
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), BSRConfig())
        >>> model.base_model.plan().trained_blocks
        [3]
    """

    controller_cls = BSRController
    needs_tokens = False

    @classmethod
    def _base_head(cls, model: nn.Module) -> AbstractContextManager[None]:
        return _without_heads(model)

    @classmethod
    def _check_tokens(cls, model: nn.Module, spec: ModelSpec, config: BlockConfig) -> None:
        """Raise an error if `config` drops tokens and the model cannot.

        Raises:
            UnsupportedModelError: With the settings, and what to use instead.
        """
        needed = config.needs_tokens if isinstance(config, BSRConfig) else {}
        if spec.no_reduction is None or not needed:
            return
        given = " and ".join(f"`{name}={getattr(config, name)!r}`" for name in needed)
        instead = ", ".join(f"`{name}={value}`" for name, value in needed.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} has no token reduction: {spec.no_reduction}. It is needed for {given}. Use "
            f"{instead}: the blocks that you choose then train, whole or low-rank, the gradient is cut before them, "
            "and halves run lean."
        )

    @classmethod
    def _other_targets(cls, model: nn.Module, spec: ModelSpec, config: BlockConfig, plan: Plan) -> dict[str, Way]:
        """Heads of tasks, which replace the classifier, and mixtures of experts in the blocks' controllers."""
        if not config.tasks:
            return {}
        mixtures = [spec.blocks[index] for index, block in enumerate(plan.blocks) if block.mixture]
        found: dict[str, Way] = {find_classifier(model, spec, "the heads of `tasks` take"): "heads"}
        return found | {f"{block}.{CONTROLLER}": "mixture" for block in mixtures}

    @classmethod
    def _verify(cls, model: nn.Module, spec: ModelSpec, plan: Plan, stock: StockRun | None) -> None:
        verify_mixture(model, spec, plan, stock)

    def _record(self, model: nn.Module, config: SavedConfig, found: Resolution) -> SavedConfig:
        if config.tasks and any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError(
                "What an adapter with `tasks` costs is not predicted without the model's weights. Attach the adapter "
                "and measure."
            )
        return super()._record(model, config, found)

    def _assign(self, model: nn.Module, adapter_name: str, given: SavedConfig, found: Resolution) -> None:
        super()._assign(model, adapter_name, given, found)
        if given.tasks:
            first = self._attached_controllers(model, found.spec)[0]
            first.detached(model)
            balance_weight = given.moe.balance_weight if given.moe else 0.0
            first.calls[adapter_name] = TaskSettings(given.tasks, given.task_weights or {}, balance_weight)
            first.attached(model)

    def _offloaded(self, model: nn.Module) -> list[str]:
        mlps = {id(module) for controller in self.controllers for module, _ in controller.offloaded}
        inside = [f"{name}.{p}" for name, m in model.named_modules() if id(m) in mlps for p, _ in m.named_parameters()]
        return super()._offloaded(model) + inside

    def _other_module(self, way: Way | None, config: BlockConfig, layer: BlockWeights) -> nn.Module | None:
        """Heads of several tasks."""
        if way != "heads":
            return None
        spec = config.resolution.spec
        context = self._attached_controllers(self.model, spec)[0].context
        sizes = (layer.in_features, spec.width, find_final_norm(self.model, spec), spec.num_prefix)
        return TaskHeads([new_head(task, *sizes) for task in config.tasks], config.tasks, context)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> list[str]:
        """Raise if the adapter has parts that the base model has no place for."""
        for name in adapter_names or self.active_adapters:
            config = self.peft_config.get(name)
            if config is not None and config.tasks:
                raise AdapterError(
                    f"Adapter {name!r} cannot be merged: it has a head for each of its tasks"
                    + (" and mixtures of experts" if config.moe else "")
                    + ", which the base model has no place for. Keep the adapter; `export_task` writes one for a "
                    "single task."
                )
        return super()._check_merge(adapter_names, safe_merge)


@contextmanager
def _without_heads(model: nn.Module) -> Iterator[None]:
    """Context manager: the base model's classifier runs instead of the heads of several tasks."""
    enabled = [m for m in model.modules() if isinstance(m, BlockWeights) and not m.disable_adapters]
    layers = [layer for layer in enabled if any(isinstance(m, TaskHeads) for m in layer.bsr_params.values())]
    with disabled_layers(layers):
        yield


__all__ = ["BSRModel"]
