"""Tuner layers of SynQT: a controller on each block, and the head that replaces the classifier.

What the queries have read is passed from block to block, and to the head, in the context of the running forward, not
on a module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.backbones import FamilyRule, ModelSpec
from peft_bsr.core import ForwardContext, hidden_tokens, pick_tokens
from peft_bsr.engine import Plan, QueryPath, StopForwardError, attention_mask
from peft_bsr.errors import ForwardError
from peft_bsr.tuners.base.layer import SingleAdapterLayer, drop_saved_name
from peft_bsr.tuners.base.reading import ReadingController
from peft_bsr.tuners.synqt.config import SynQTConfig
from peft_bsr.tuners.synqt.network import FusingHead, QuerySynthesis


@dataclass
class Reading:
    """What one forward's queries have read so far.

    Attributes:
        feature_scale: s_feat. None if only one layer is read.
        reads: (H, F_att, F_ffn) of each layer, averaged over the queries, each [B, 1, D].
    """

    feature_scale: Tensor | None
    reads: list[tuple[Tensor, ...]] = field(default_factory=list)

    @property
    def feature(self) -> Tensor | None:
        """H of the previous layer."""
        return self.reads[-1][0] if self.reads else None

    def features(self) -> Tensor:
        """All features in the order of the head, [B, 1 + 3 L, D]."""
        by_kind = [feature for kind in zip(*self.reads, strict=True) for feature in kind]
        return torch.cat([self.reads[-1][0], *by_kind], dim=1)


class SynQTController(ReadingController):
    """A block controller that turns an adapter's prompts into queries and runs them through the block's weights.

    Args:
        index: Index of the block.
        spec: Description of the model.
        context: Shared by the controllers and the head of one model.
        rule: Exceptions of the model's family.
        like: A weight of the block. Adapters have its device and dtype.
    """

    adapter_layer_names = ("synqt_params",)
    other_param_names = ("plans", "paths", "layers")
    place: Tensor  # on the block's device, in its dtype; empty

    def __init__(self, index: int, spec: ModelSpec, context: ForwardContext, rule: FamilyRule, like: Tensor) -> None:
        super().__init__(index, spec, context, rule)
        self.synqt_params = nn.ModuleDict()
        self.paths: dict[str, QueryPath] = {}
        self.register_buffer("place", torch.empty(0, device=like.device, dtype=like.dtype), persistent=False)

    def update_layer(
        self, adapter_name: str, config: SynQTConfig, plan: Plan, path: QueryPath, layers: list[int]
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            plan: Plan of the frozen blocks.
            path: How blocks are read.
            layers: Indices of the blocks that are read, ascending.
        """
        self.plans[adapter_name], self.paths[adapter_name], self.layers[adapter_name] = plan, path, layers
        if self.index in layers:
            holds_scale = self.index == layers[0] and len(layers) > 1  # with one layer there is nothing to scale
            self.synqt_params[adapter_name] = QuerySynthesis(self.spec.width, config, holds_scale)
            self._move_adapter_to_device_of_base_layer(adapter_name)

    def instead(
        self, block: nn.Module, hidden_states: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor | None:
        """Read the block if it is to be read. Returns a replacement for its output if the block need not run.

        Args:
            block: The block.
            hidden_states: Input of the block, [B, N, D].
            args: Further arguments of the call.
            kwargs: Keyword arguments of the call.

        Raises:
            StopForwardError: After the last layer, if the forward only collects tokens.
            AdapterError: If the block is sharded by itself.
        """
        name = self.carried_adapter
        assert name is not None, "a controller without an adapter has no plan, and its block runs untouched"
        layers, resume_point = self.layers[name], self.context.now.resume_point
        starts_after = resume_point is not None and resume_point.starts
        if self.index in layers:
            self.refuse_sharded(block, "SynQT")
            if resume_point is not None and starts_after:
                self._read(name, block, resume_point.part(layers.index(self.index)), None)
            else:
                alive, hidden = self._alive(hidden_states, args, kwargs)
                tokens = self.paths[name].tokens_of(block, alive)
                if resume_point is None:
                    self._read(name, block, tokens, hidden)
                else:
                    self._collect(tokens, layers)
        return hidden_states if starts_after or self.index >= layers[-1] else None

    def _alive(
        self, hidden_states: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens that are left on the current route, and which of them are padding."""
        route, mask = self.context.now.route, attention_mask(self.spec, args, kwargs)
        if route is not None and route.origins is not None:
            mask = route.gather(mask, "mask")
            if route.is_full_view and route.num_tokens < route.full_length:
                hidden_states = pick_tokens(hidden_states, route.places())
        return hidden_states, hidden_tokens(mask)

    def _read(self, name: str, block: nn.Module, tokens: Tensor, hidden: Tensor | None) -> None:
        module: Any = self.synqt_params[name]
        if self.index == self.layers[name][0]:
            self.context.now.reading = Reading(module.feature_scale)
        reading = self.context.now.reading
        if not isinstance(reading, Reading):
            raise ForwardError("a block that SynQT reads was called outside of the model's forward. Call the model.")
        queries = module(reading.feature, reading.feature_scale, tokens.shape[0])
        attended, expanded = self.paths[name].read(block, queries, tokens, hidden)
        outcome = queries + attended + expanded
        reading.reads.append(tuple(t.mean(dim=1, keepdim=True) for t in (outcome, attended, expanded)))

    def _collect(self, tokens: Tensor, layers: list[int]) -> None:
        collected = [] if self.index == layers[0] else self.context.now.reading
        self.context.now.reading = [*collected, tokens]
        if self.index == layers[-1]:
            resume_point, collected = self.context.now.resume_point, self.context.now.reading
            assert resume_point is not None, "tokens are collected for a resume point"
            resume_point.fill(collected)
            raise StopForwardError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        _move(self.synqt_params, adapter_name, self.place)

    def __repr__(self) -> str:
        return f"synqt.SynQTController(block={self.index}, adapters={sorted(self.plans)})"


class SynQTHead(nn.Module, SingleAdapterLayer):
    """The fusing head, which replaces the classifier. Its input is what the queries have read, not its argument.

    Args:
        base_layer: The model's classifier.
        context: Shared with the controllers.
    """

    adapter_layer_names = ("synqt_params",)

    def __init__(self, base_layer: nn.Linear, context: ForwardContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.synqt_params = nn.ModuleDict()
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.register_load_state_dict_pre_hook(drop_saved_name)

    def update_layer(
        self, adapter_name: str, config: SynQTConfig, width: int, num_layers: int, final_norm: nn.Module | None
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            width: Embedding dimension, D.
            num_layers: Number of layers that are read, L.
            final_norm: The backbone's final norm, or None.
        """
        self.synqt_params[adapter_name] = FusingHead(width, num_layers, self.out_features, config, final_norm)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits [B, classes] of the active adapter, or of the base model if none is active.

        Raises:
            ForwardError: If it was called outside of the model's forward.
        """
        name = self.carried_adapter
        if name is None:
            output: Tensor = self.base_layer(pooled)
            return output
        reading, self.context.now.reading = self.context.now.reading, None
        if not isinstance(reading, Reading):
            raise ForwardError("the head of SynQT was called without a forward of the model's blocks. Call the model.")
        logits: Tensor = self.synqt_params[name](reading.features())
        return logits if torch.is_autocast_enabled(pooled.device.type) else logits.to(pooled.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        _move(self.synqt_params, adapter_name, next(self.base_layer.parameters()))

    def __repr__(self) -> str:
        return "synqt." + super().__repr__()


def _move(modules: nn.ModuleDict, adapter_name: str, like: Tensor) -> None:
    if adapter_name in modules and not any(p.is_meta for p in modules[adapter_name].parameters()):
        modules[adapter_name].to(device=like.device, dtype=like.dtype if like.dtype.is_floating_point else None)
