"""Base classes of methods with a side network that reads blocks of a frozen backbone."""

from __future__ import annotations

import torch
from torch import nn

from peft_bsr.backbones import FamilyRule, ModelSpec
from peft_bsr.core import ForwardContext
from peft_bsr.errors import AdapterError
from peft_bsr.tuners.base.layer import AdapterController, drop_saved_name, find_controllers
from peft_bsr.tuners.base.tuner import MethodTuner

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule


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

    def refuse_sharded(self, block: nn.Module, method: str) -> None:
        """Raise if the block is sharded by itself: the side network needs its weights outside of the block.

        Args:
            block: The block.
            method: Name of the method.

        Raises:
            AdapterError: If `fully_shard` was called on the block.
        """
        if torch.distributed.is_available() and isinstance(block, FSDPModule):
            raise AdapterError(
                f"{method} reads the weights of block {self.index} outside of the block's own forward and backward, "
                "but they are sharded: `fully_shard(block)` gathers them for these alone. Call `fully_shard(model)` "
                "for the whole model only (Accelerate: `fsdp_auto_wrap_policy: NO_WRAP`), or use "
                "DistributedDataParallel."
            )


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
