"""The block controller of BSR: each adapter's plan, the block's mixtures of experts, and calls with tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import FamilyRule, ModelSpec
from peft_bsr.compat.torch_api import remove_hooks
from peft_bsr.core import ForwardContext, TaskCall, outliving
from peft_bsr.engine import WeightOffload, plain_mlp
from peft_bsr.errors import ForwardError
from peft_bsr.multitask import (
    FullExperts,
    ImageCall,
    LowRankExperts,
    Mixture,
    PlainMLP,
    TaskConfig,
    collect_output,
    read_call,
    without_tasks,
)
from peft_bsr.tuners.base.classifier import without_layer
from peft_bsr.tuners.base.layer import drop_saved_name
from peft_bsr.tuners.blocks.controller import MergeableController
from peft_bsr.tuners.blocks.layer import BlockWeights, move_away
from peft_bsr.tuners.bsr.config import BSRConfig


@dataclass(frozen=True)
class TaskSettings:
    """The tasks of an adapter, as its forwards need them.

    Attributes:
        tasks: Tasks in the order of their heads and gates.
        weights: Name -> weight of the task's loss.
        balance_weight: Weight of the balance loss.
    """

    tasks: list[TaskConfig]
    weights: dict[str, float]
    balance_weight: float


class BSRController(MergeableController):
    """A block controller with one plan per adapter. Token reduction stays active after a merge.

    It contains each adapter's mixture of experts for this block. While a mixture runs, the weights of the block's MLP
    are offloaded (see `peft_bsr.engine.WeightOffload`), unless the experts share them. The first block's controller
    opens and closes the forwards of adapters with tasks.

    Args:
        index, spec, context, rule: See `BlockController`.
    """

    mixes = True
    adapter_layer_names: tuple[str, ...] = ("bsr_params",)
    other_param_names = ("plans", "calls")

    def __init__(self, index: int, spec: ModelSpec, context: ForwardContext, rule: FamilyRule) -> None:
        super().__init__(index, spec, context, rule)
        self.bsr_params = nn.ModuleDict()
        self.calls: dict[str, TaskSettings] = {}
        self.saved_as: dict[str, str] = {}  # adapter -> this module's name in the adapter's file, if it differs
        self.offloaded: tuple[
            tuple[nn.Module, WeightOffload], ...
        ] = ()  # a tuple: the block's modules are not the controller's
        self.observes = index == spec.depth - 1
        self.register_load_state_dict_pre_hook(drop_saved_name)

    def update_layer(self, adapter_name: str, config: BSRConfig, block: nn.Module) -> None:
        """Add an adapter's mixture, created from the block's pretrained MLP.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            block: The block.
        """
        moe, tasks = config.moe, config.tasks
        assert moe is not None and tasks is not None, "checked by the configuration"
        first, _, second = self._mlp(block)
        self.offloaded = self.offloaded or tuple((without_layer(module), WeightOffload()) for module in (first, second))
        weight = next(without_layer(first).parameters())
        device = first.device if isinstance(first, BlockWeights) else weight.device
        like = torch.empty(0, dtype=weight.dtype, device=device)
        experts: FullExperts | LowRankExperts
        if moe.expert_type == "full":
            experts = FullExperts(_pretrained(first, device), _pretrained(second, device), moe)
        else:
            experts = LowRankExperts(self.spec.width, first.out_features, moe, like)
        mixture = Mixture(experts, len(tasks), self.spec.width, moe, like)
        if not config.init_weights:
            move_away(mixture)
        self.bsr_params[adapter_name] = mixture.train(block.training)

    def mix(self, block: nn.Module, call: TaskCall | None, tokens: Tensor) -> Tensor:
        """The active adapter's mixture."""
        name = self.carried_adapter
        if name is None or call is None:
            raise ForwardError("a block with a mixture of experts ran outside of the model's forward. Call the model.")
        mixture: Any = self.bsr_params[name]
        inputs = tokens
        if not torch.is_autocast_enabled(tokens.device.type):
            inputs = tokens.to(mixture.gates.dtype)
        output: Tensor = mixture(inputs, call, self.index, PlainMLP(*self._mlp(block)))
        return output if torch.is_autocast_enabled(tokens.device.type) else output.to(tokens.dtype)

    @property
    def offloads_base(self) -> bool:
        """Whether the weights of the block's MLP are unused, because the active adapter's experts have their own."""
        name = self.carried_adapter
        mixture: Any = self.bsr_params[name] if name is not None and name in self.bsr_params else None
        return mixture is not None and isinstance(mixture.experts, FullExperts)

    def place_base(self) -> None:
        """Offload the weights of the block's MLP if they are unused, else load them to the experts' device."""
        if not self.offloads_base:
            self.fetch_base()
            return
        for module, weight_offload in self.offloaded:
            weight_offload.offload(module)

    def fetch_base(self) -> None:
        """Load the weights of the block's MLP to the experts' device."""
        for module, weight_offload in self.offloaded:
            weight_offload.onload(module, self._device)

    def clear_base(self) -> None:
        """Load the weights of the block's MLP and end their offloading."""
        for module, weight_offload in self.offloaded:
            weight_offload.clear(module, self._device)

    @property
    def _device(self) -> torch.device:
        own = (parameter for mixture in self.bsr_params.values() for parameter in mixture.parameters())
        return next((parameter.device for parameter in own if not parameter.is_meta), torch.device("cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BSRController:
        super()._apply(fn, recurse)
        self.place_base()
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active."""
        super().set_adapter(adapter_names, inference_mode)
        self.place_base()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, after loading the block's MLP to its experts' device."""
        self.fetch_base()
        super().delete_adapter(adapter_name)
        self.place_base()

    def _mlp(self, block: nn.Module) -> tuple[Any, Any, Any]:
        parts = None if self.spec.block_spec is None else plain_mlp(block, self.spec.block_spec)
        assert parts is not None, "checked when the adapter was attached"
        return parts

    def observe(self, before: Tensor, after: Tensor) -> None:
        """Keep the last block's tokens for dense heads."""
        call = self.context.now.call
        if call is not None and call.keeps_tokens:
            call.tokens = after

    @property
    def task_settings(self) -> TaskSettings | None:
        """The task settings of the active adapter, or None if it has no tasks."""
        return self.calls.get(self.carried_adapter or "")

    def attached(self, model: nn.Module) -> None:
        """Register hooks that open and close the model's forwards, if an adapter has tasks."""
        if self.index == 0 and self.calls:
            model.register_forward_pre_hook(self.open_call, prepend=True, with_kwargs=True)
            model.register_forward_hook(self.close_call, always_call=True)

    def detached(self, model: nn.Module) -> None:
        """Remove the hooks of `attached`."""
        remove_hooks(model, self)

    def open_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Remove the arguments about tasks from the call."""
        settings, resume_point = self.task_settings, self.context.now.resume_point
        self.context.now.call = None
        if settings is None or (resume_point is not None and resume_point.tokens is None):
            return args, without_tasks(kwargs)
        num_images = None if resume_point is None or resume_point.tokens is None else len(resume_point.tokens)
        call, kwargs = read_call(settings.tasks, self.spec, args, kwargs, num_images)
        call.usage = None if self.context.now.usage is None else {}
        self.context.now.call = call
        return args, kwargs

    def close_call(self, model: nn.Module, args: tuple[object, ...], output: object) -> object:
        """Combine losses and outputs of the tasks. After an error, only discard the call."""
        now = self.context.now
        call, now.call = now.call, None
        settings, totals = self.task_settings, now.usage
        if not isinstance(call, ImageCall):
            return None
        try:
            if output is None or settings is None:
                return None
            if totals is not None:
                for index, counts in (call.usage or {}).items():
                    totals[index] = outliving(totals[index] + counts if index in totals else counts)
            return collect_output(settings.tasks, settings.weights, settings.balance_weight, call, output)
        finally:
            call.close()

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable adapters."""
        super().enable_adapters(enabled)
        self.place_base()

    def __repr__(self) -> str:
        return f"bsr.BSRController(block={self.index}, plans={sorted(self.plans)})"


def _pretrained(module: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pretrained weight and bias of a Linear, with or without a tuner layer."""
    own = without_layer(module)
    values = {name: parameter.detach() for name, parameter in own.named_parameters()}
    if isinstance(module, BlockWeights):
        values = {name: module.pretrained(name, value) for name, value in values.items()}
    return values["weight"].to(device), values["bias"].to(device) if "bias" in values else None
