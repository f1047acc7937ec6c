"""Base classes of methods with a side network that reads blocks of a frozen backbone."""

from __future__ import annotations

from peft_bsr.backbones import FamilyRule, ModelSpec
from peft_bsr.core import ForwardContext
from peft_bsr.tuners.base.layer import AdapterController, drop_saved_name, find_controllers
from peft_bsr.tuners.base.tuner import MethodTuner


class ReadingController(AdapterController):
    """A block controller that knows which blocks each adapter reads.

    Args:
        index, spec, context, rule: See `BlockController`.
    """

    builds_graph = False
    other_param_names: tuple[str, ...] = ("plans", "layers")

    def __init__(self, index: int, spec: ModelSpec, context: ForwardContext, rule: FamilyRule) -> None:
        super().__init__(index, spec, context, rule)
        self.layers: dict[str, list[int]] = {}
        self.register_load_state_dict_pre_hook(drop_saved_name)

    @property
    def read_layers(self) -> list[int]:
        """The blocks that the active adapter reads."""
        name = self.carried_adapter
        return [] if name is None else self.layers[name]


class ReadingTuner(MethodTuner):
    """Tuner over `ReadingController`s. The frozen weights are not changed, so there is nothing to merge."""

    merges = False

    def layers(self, adapter_name: str | None = None) -> list[int]:
        """The blocks that an adapter reads. Default None: the active adapter.

        Raises:
            AdapterError: If there is no adapter of that name.
        """
        self.plan(adapter_name)
        layers: list[int] = find_controllers(self.model)[0].layers[adapter_name or self.active_adapters[0]]
        return layers


__all__ = ["ReadingController", "ReadingTuner"]
