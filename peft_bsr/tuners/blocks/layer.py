"""The tuner layer of methods that train blocks: trained weights on one leaf module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_bsr.compat.peft_api import cast_input_dtype, check_adapters_to_merge
from peft_bsr.compat.torch_api import copy_with_hooks
from peft_bsr.engine import WeightOffload
from peft_bsr.errors import AdapterError
from peft_bsr.tuners.base.layer import SingleAdapterLayer, check_single, drop_saved_name
from peft_bsr.tuners.blocks.config import BlockConfig


class LowRankUpdate(nn.Module):
    """`x -> base(x) + (lora_alpha / r) * (x A^T) B^T` on one Linear module; B starts at zero.

    Args:
        base: The Linear to update. Only its shape, dtype and device are used.
        r: Rank.
        lora_alpha: Scale, divided by `r`.
    """

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        self.scaling = lora_alpha / r
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The update alone, [..., in_features] -> [..., out_features]."""
        down = nn.functional.linear(hidden_states, self.lora_A)
        return nn.functional.linear(down, self.lora_B) * self.scaling

    def merged_weight(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] plus the update, in the dtype of `weight`."""
        return (weight.to(self.lora_A.dtype) + self.scaling * (self.lora_B @ self.lora_A)).to(weight.dtype)


def move_away(module: nn.Module) -> None:
    """Start away from the base model (`init_weights=False`)."""
    for name, parameter in module.named_parameters():
        if not name.endswith("lora_A"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)


def move_like(module: nn.Module, like: Tensor, device: torch.device) -> None:
    """Move a module to a device and, if floating point, to the dtype of `like`."""
    if not any(p.is_meta for p in module.parameters()):
        module.to(device=device, dtype=like.dtype if like.dtype.is_floating_point else None)


def _replicated(module: nn.Module) -> Tensor:
    """A weight in a replica of nn.DataParallel, where weights are not parameters."""
    return next(value for m in module.modules() for value in vars(m).values() if isinstance(value, Tensor))


class BlockWeights(nn.Module, SingleAdapterLayer):
    """A tuner layer on a leaf module: one trained copy of the module, or one low-rank update, per adapter.

    While a copy runs, the base module's weights are offloaded, see `peft_bsr.engine.WeightOffload`.

    Args:
        base_layer: The frozen module.
    """

    adapter_layer_names = ("bsr_params",)

    base_layer: Any
    in_features: int  # of a Linear, with the next one
    out_features: int

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bsr_params = nn.ModuleDict()
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self.unmerged_weights: dict[str, Tensor] = {}
        self.others: set[str] = set()  # adapters with a module other than a copy
        self.weight_offload = WeightOffload()
        self.adapter_state = object()  # replaced after each change of what runs here
        self.saved_as: dict[str, str] = {}  # adapter -> this module's name in the adapter's file, if it differs
        self.register_load_state_dict_pre_hook(drop_saved_name)
        for name in ("in_features", "out_features"):
            if hasattr(base_layer, name):
                setattr(self, name, getattr(base_layer, name))

    def update_layer(
        self, adapter_name: str, config: BlockConfig, low_rank: bool = False, other: nn.Module | None = None
    ) -> None:
        """Add an adapter. It starts as the base module, or away from it with `init_weights=False`.

        Args:
            adapter_name: Name of the adapter.
            config: Configuration of the adapter.
            low_rank: Add a low-rank update instead of a copy.
            other: Add this module instead of a copy.
        """
        module: nn.Module
        self.others.discard(adapter_name)  # from a deleted adapter of the same name
        if other is not None:
            module = other
            self.others.add(adapter_name)
            move_like(module, next(self.base_layer.parameters()), self.device)
        elif low_rank:
            module = LowRankUpdate(self.base_layer, config.r, config.lora_alpha)
            move_like(module, self.base_layer.weight, self.device)  # offloaded base weights are on the CPU
        else:
            module = copy_with_hooks(self.base_layer)
            for name, parameter in list(module.named_parameters()):
                start = self.pretrained(name, parameter).detach().to(self.device, copy=True)
                # registered again, so that PEFT's low_cpu_mem_usage moves it to the meta device
                owner, _, own_name = name.rpartition(".")
                module.get_submodule(owner).register_parameter(own_name, nn.Parameter(start))
        if not config.init_weights:
            move_away(module)
        module.train(self.base_layer.training)
        self.bsr_params[adapter_name] = module

    def pretrained(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter of the base module as it was before any merge."""
        return self.unmerged_weights.get(name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active adapter's module instead of the base module."""
        if self.merged_adapters and self._disable_adapters:
            self.unmerge()
        name = self.carried_adapter
        if name is None or self.merged_adapters:
            return self.base_layer(*args, **kwargs)
        module: Any = self._carried()[name]
        if not args and "hidden_states" not in kwargs:  # a position bias that is the same for every window
            return module(**kwargs)
        hidden_states, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if not isinstance(hidden_states, Tensor) or torch.is_autocast_enabled(hidden_states.device.type):
            inputs = hidden_states  # a position bias gets a window size; autocast picks the dtypes itself
        else:
            like = next(module.parameters(), None)
            like = _replicated(module) if like is None else like
            inputs = cast_input_dtype(self, hidden_states, like.dtype)
        if isinstance(module, LowRankUpdate):
            output = self.base_layer(hidden_states, *args, **kwargs)
            return output + module(inputs).to(output.dtype)
        output = module(inputs, *args, **kwargs)
        return output.to(hidden_states.dtype) if isinstance(output, Tensor) and inputs is not hidden_states else output

    @property
    def device(self) -> torch.device:
        """The device on which the module runs. Offloaded base weights are on the CPU."""
        trained = (p for module in self.bsr_params.values() for p in module.parameters())
        return next((p.device for p in trained if not p.is_meta), next(self.base_layer.parameters()).device)

    @property
    def offloads_base(self) -> bool:
        """Whether the base module's weights are unused, because a trained copy runs."""
        name = self.carried_adapter
        return name is not None and not self.merged and not isinstance(self.bsr_params[name], LowRankUpdate)

    def place_base(self) -> None:
        """Offload the base module's weights if they are unused, else load them to the device of the module.

        Called after each change of what runs; also replaces `adapter_state`, so that cached look-ups are repeated.
        """
        self.adapter_state = object()
        if self.offloads_base:
            self.weight_offload.offload(self.base_layer)
        else:
            self.fetch_base()

    def fetch_base(self) -> None:
        """Load the base module's weights to the device of the module."""
        self.weight_offload.onload(self.base_layer, self.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockWeights:
        super()._apply(fn, recurse)
        with torch.no_grad():
            self.unmerged_weights = {name: fn(weight) for name, weight in self.unmerged_weights.items()}
        self.place_base()
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active."""
        super().set_adapter(adapter_names, inference_mode)
        self.place_base()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter. If the base module's weights are used then, they are on the device where it was."""
        device = self.device
        super().delete_adapter(adapter_name)
        if not self.offloads_base:
            self.weight_offload.onload(self.base_layer, device)

    def active_module(self) -> tuple[nn.Module | None, LowRankUpdate | None]:
        """The module that `forward` runs (None if it is not a single module), and its low-rank update or None."""
        name = self.carried_adapter
        if name is None or self.merged:
            return self.base_layer, None
        module = self.bsr_params[name]
        if isinstance(module, LowRankUpdate):
            return self.base_layer, module
        return (None if name in self.others else module), None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base module's weights by the adapter's. The old ones are kept for `unmerge`.

        Args:
            safe_merge: Whether to check that the weights are finite. Default False.
            adapter_names: The adapter to merge. Default None: the active adapter.

        Raises:
            AdapterError: If several are named, or with `safe_merge`, if a weight is NaN or infinite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.bsr_params]
        if not names:
            return
        check_single(names, "merge")
        if self.merged:
            self.unmerge()
        if safe_merge:
            self.check_finite(names[0])
        weights = self._merged_weights(names[0])
        for name, weight in weights.items():
            parameter = self.base_layer.get_parameter(name)
            self.unmerged_weights[name] = parameter.data
            parameter.data = weight
        self.merged_adapters.append(names[0])
        self.place_base()

    def check_finite(self, adapter_name: str) -> None:
        """Raise if merged weights would be NaN or infinite.

        Raises:
            AdapterError: If there are any.
        """
        if adapter_name not in self.bsr_params:
            return
        if not all(bool(weight.isfinite().all()) for weight in self._merged_weights(adapter_name).values()):
            raise AdapterError(
                f"Adapter {adapter_name!r} has weights that are NaN or infinite; nothing was merged. "
                "Train it again or load an earlier checkpoint."
            )

    def unmerge(self) -> None:
        """Restore the base module's weights exactly."""
        for name, weight in self.unmerged_weights.items():
            self.base_layer.get_parameter(name).data = weight
        self.unmerged_weights = {}
        self.merged_adapters.clear()
        self.place_base()

    def _merged_weights(self, adapter_name: str) -> dict[str, Tensor]:
        module = self.bsr_params[adapter_name]
        with torch.inference_mode(False), torch.no_grad():  # the weights may train later
            if isinstance(module, LowRankUpdate):
                return {"weight": module.merged_weight(self.base_layer.get_parameter("weight").to(self.device))}
            dtypes = {name: p.dtype for name, p in self.base_layer.named_parameters()}
            return {name: p.detach().to(dtypes[name], copy=True) for name, p in module.named_parameters()}

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable adapters. Disabling also unmerges, so that the output is the base model's."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self.place_base()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.bsr_params:
            return
        base = next(self.base_layer.parameters())  # PEFT reads `weight`, which a LayerScale does not have
        module = self.bsr_params[adapter_name]
        if not any(p.is_meta for p in module.parameters()):
            dtype = base.dtype if base.dtype.is_floating_point else None
            module.to(device=device or self.device, dtype=dtype)

    def __repr__(self) -> str:
        return "bsr." + super().__repr__()
