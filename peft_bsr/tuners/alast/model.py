"""The tuner of ALaST: every block may train, and the plan changes from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec
from peft_bsr.engine import Plan
from peft_bsr.errors import AdapterError, UnsupportedModelError
from peft_bsr.tuners.alast.layer import STATE, ALaSTController
from peft_bsr.tuners.alast.schedule import ALaSTSchedule, check_state
from peft_bsr.tuners.base.config import SavedConfig
from peft_bsr.tuners.base.layer import find_controllers
from peft_bsr.tuners.base.resolution import Resolution
from peft_bsr.tuners.blocks.layer import BlockWeights
from peft_bsr.tuners.blocks.tuner import BlockTuner


class ALaSTModel(BlockTuner):
    """ALaST on a vision transformer; made by `get_peft_model(model, ALaSTConfig())`.

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
        >>> from peft_bsr import ALaSTConfig
        >>> tiny = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = get_peft_model(ViTForImageClassification(tiny), ALaSTConfig())
        >>> model.base_model.schedule().budgets
        [0.95, 0.95, 0.95, 0.95]
    """

    controller_cls = ALaSTController
    reduces_in_evaluation = False

    def schedule(self, adapter_name: str | None = None) -> ALaSTSchedule:
        """Budgets and selected blocks of an adapter. Default None: the active adapter.

        Raises:
            AdapterError: If there is no adapter of that name.
        """
        name = adapter_name or (self.active_adapters or [None])[0]
        controllers = find_controllers(self.model)
        if not controllers or name not in controllers[0].schedules:
            raise AdapterError(f"There is no adapter {name!r}; this model has {sorted(self.peft_config)}.")
        return controllers[0].schedules[name]

    def plan(self, adapter_name: str | None = None) -> Plan:
        """The plan of the current step; before the first step, the plan in which every block trains.

        Raises:
            AdapterError: If there is no adapter of that name.
        """
        return self.schedule(adapter_name).plan or super().plan(adapter_name)

    def _assign(self, model: nn.Module, adapter_name: str, given: SavedConfig, found: Resolution) -> None:
        """Create one schedule for all controllers, with the adapter's weights in each block."""
        spec, plan = found.spec, found.plan
        blocks: list[list[nn.Module]] = [[] for _ in spec.blocks]
        others: list[nn.Module] = []
        for name, module in model.named_modules():
            if isinstance(module, BlockWeights) and adapter_name in module.bsr_params:
                index = next((i for i, block in enumerate(spec.blocks) if name.startswith(f"{block}.")), None)
                (others if index is None else blocks[index]).append(module.bsr_params[adapter_name])
        schedule = ALaSTSchedule(self.peft_config[adapter_name], plan, blocks, others)
        for controller in self._attached_controllers(model, spec):
            controller.add_schedule(adapter_name, schedule)
        super()._assign(model, adapter_name, given, found)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: SavedConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: object
    ) -> dict[str, Tensor]:
        """Adds the schedule's state, which is neither a parameter nor a buffer."""
        found = super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict, **kwargs
        )
        return found | {key: value for key, value in state_dict.items() if key.endswith(f".{STATE}.{adapter_name}")}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Handles the key of the schedule's state, too."""
        if key.endswith(f".{STATE}.{adapter_name}"):
            return key.removesuffix(f".{adapter_name}")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _own_state(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Includes the schedule's state."""
        places = {name: m for name, m in model.named_modules() if isinstance(m, ALaSTController) and m.index == 0}
        states = {f"{name}.{STATE}.{adapter_name}": m.bsr_state[adapter_name] for name, m in places.items()}
        return super()._own_state(model, adapter_name) | states

    @classmethod
    def _problems_of(cls, model: nn.Module, config: Any, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Problems of the schedule's state in a file."""
        states = {name: tensor for name, tensor in state_dict.items() if f".{STATE}." in name}
        depth = len(find_controllers(model))
        return [f"{name}: {problem}." for name, t in states.items() for problem in check_state(t, depth, config)]

    def _record(self, model: nn.Module, config: SavedConfig, found: Resolution) -> SavedConfig:
        own = super()._record(model, config, found)
        if own.train_embeddings:
            embeddings = map(found.spec.full_name, find_embeddings(model, found.spec))
            own.modules_to_save = sorted({*(own.modules_to_save or ()), *embeddings})
        return own


def find_embeddings(model: nn.Module, spec: ModelSpec) -> list[str]:
    """Names of the outermost modules before the blocks that have parameters of their own.

    Raises:
        UnsupportedModelError: If the model itself has parameters, which `modules_to_save` cannot name.
    """
    inside = (*spec.blocks, *spec.head, *spec.unread)
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    owners = {n for n in owners if not any(f"{n}.".startswith(f"{part}.") for part in inside)}
    if "" in owners:
        raise UnsupportedModelError(
            f"{type(model).__name__} has parameters of its own outside of its modules, which `modules_to_save` cannot "
            "name. Use `train_embeddings=False`."
        )
    found = sorted(n for n in owners if not any(n.startswith(f"{other}.") for other in owners))
    for name in found:  # PEFT matches every module name that ends with it
        if inside_it := [n for n, _ in model.named_modules() if n.startswith(f"{name}.") and n.endswith(name)]:
            raise UnsupportedModelError(
                f"{type(model).__name__}: `modules_to_save` cannot name {name!r}, because {inside_it[0]!r} inside it "
                "ends with the same name. Use `train_embeddings=False`, or a model with a head, where names are longer."
            )
    return found


__all__ = ["ALaSTModel"]
