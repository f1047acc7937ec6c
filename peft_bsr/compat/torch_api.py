"""Private interfaces of torch that the package uses. Tested with torch 2.13.0 and 2.14.1."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import DataDependentOutputException as NeedsValues
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"

Hook = Callable[..., object]

PARAMETERS = "_parameters"
"""Attribute of a module: its own parameters by name. Writing to it bypasses wrappers of `register_parameter`."""

MODULES = "_modules"
"""Attribute of a module: its children by name. This and `PARAMETERS` are names, not functions, because they are read in
every forward and by compilers.
"""

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Fused attention on the CPU, which torch's FLOP counter does not know."""

CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Backward of `CPU_ATTENTION`."""

softmax_backward = torch.ops.aten._softmax_backward_data
"""`(gradient, weights, dim, dtype) -> gradient of the logits`, where `weights` is their softmax over `dim`."""

ONNX_REGISTRATION_LOGGER = "torch.onnx._internal.exporter._registration"
"""Name of the logger with which the exporter reports that torchvision is not installed."""


def share_contents(module: nn.Module, other: nn.Module) -> None:
    """Give `module` the children, parameters and buffers of `other`; what is replaced in one is replaced in both."""
    vars(module).update({name: vars(other)[name] for name in (MODULES, PARAMETERS, "_buffers")})


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage while it lives; Python objects of one storage share it."""
    return storage._cdata


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place."""
    return tensor._version


def hook_dictionaries(module: nn.Module) -> list[dict[int, Hook]]:
    """The dictionaries in which a module keeps its hooks; the key of a hook is never used again."""
    return [hooks for name in _HOOKS if (hooks := getattr(module, name, None)) is not None]


def copy_with_hooks(base: nn.Module) -> nn.Module:
    """A deep copy that shares its hook dictionaries with `base`: a hook added to or removed from one is on both."""
    names = [*_HOOKS, "_forward_hooks_always_called", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"]
    hooks = [getattr(module, name) for module in base.modules() for name in names]
    module = copy.deepcopy(base, {id(own): own for own in hooks})
    for part in module.modules():
        if part._is_full_backward_hook is None:
            part._is_full_backward_hook = True  # a backward hook that is added later sets this on `base` only
    return module


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether the module has forward hooks or forward pre-hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of the module's own non-persistent buffers."""
    return module._non_persistent_buffers_set


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Remove the forward hooks of `module` that are methods of `owner`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def gradient_hooks(parameter: Tensor) -> dict[int, Hook]:
    """The dictionary of the parameter's post-accumulate-grad hooks (optimizers that step during backward use them).

    A new empty dictionary if the parameter never had such a hook.
    """
    hooks: dict[int, Hook] | None = parameter._post_accumulate_grad_hooks
    return {} if hooks is None else hooks


def step_hook_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimizer's attributes that hold its step hooks."""
    return [name for name in vars(optimizer) if name.startswith("_optimizer_step_")]


def leave_to_ddp(model: nn.Module, ignored: Iterable[str]) -> None:
    """Set the names of the parameters and buffers that DistributedDataParallel ignores; empty = ignore none."""
    names = list(ignored)
    if names:
        setattr(model, _IGNORED_BY_DDP, names)
    else:
        vars(model).pop(_IGNORED_BY_DDP, None)


def no_memory() -> FakeTensorMode:
    """A context in which tensors have a shape, dtype and device but no memory; the device need not exist.

    Only tensors of the same context can be combined. It may be entered again.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)  # constants of a compiled graph are real


def saved_in_node(node: Node) -> Iterator[Tensor]:
    """Tensors that a node of the autograd graph saves for backward."""
    saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    for value in (*saved, *getattr(node, "saved_tensors", ())):
        yield from (t for t in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(t, Tensor))


def recompile_limit(limit: int) -> AbstractContextManager[object]:
    """A context in which Dynamo compiles one function up to `limit` times."""
    context: AbstractContextManager[object] = torch._dynamo.config.patch(
        recompile_limit=limit, accumulated_recompile_limit=limit
    )
    return context


def activation_memory_budget() -> float:
    """Fraction of its activations that a compiled graph may save for backward; 1 = all (torch's default)."""
    return float(torch._functorch.config.activation_memory_budget)


def flop_formula(operator: Any, own: Mapping[OpOverloadPacket, Callable[..., int]]) -> Callable[..., int] | None:
    """The FLOP formula of an `OpOverload` that a dispatch mode gets, from `own` or torch's registry, or None."""
    packet = operator._overloadpacket
    return own.get(packet) or flop_registry.get(packet)


def takes_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula for `FlopCounterMode` as one that takes tensors instead of shapes."""
    vars(formula)["_get_raw"] = True
    return formula


__all__ = [
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "MODULES",
    "ONNX_REGISTRATION_LOGGER",
    "PARAMETERS",
    "NeedsValues",
    "StorageWeakRef",
    "TorchDispatchMode",
    "activation_memory_budget",
    "copy_with_hooks",
    "flop_formula",
    "gradient_hooks",
    "has_forward_hooks",
    "hook_dictionaries",
    "is_traceable_wrapper_subclass",
    "leave_to_ddp",
    "no_memory",
    "recompile_limit",
    "remove_hooks",
    "saved_in_node",
    "sdpa_backward_flop_count",
    "sdpa_flop_count",
    "softmax_backward",
    "step_hook_names",
    "storage_key",
    "takes_tensors",
    "tree_leaves",
    "tree_map_only",
    "unsaved_buffers",
    "version_of",
]
