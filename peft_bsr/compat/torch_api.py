"""Private interfaces of torch that the package uses. Tried: torch 2.13.0, 2.14.1."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"

PARAMETERS = "_parameters"
"""Attribute of a module: its own parameters by name. Writing there goes around wrappers of `register_parameter`."""

MODULES = "_modules"
"""Attribute of a module: its children by name, the dictionary itself. As the one before it is read in each forward, and
by compilers: so both are no functions.
"""

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""The CPU's fused attention, which torch's own counter of FLOPs does not know."""

CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
"""Its backward."""

softmax_backward = torch.ops.aten._softmax_backward_data
"""`(gradient, weights, dim, dtype) -> gradient of the logits`, whose softmax over the axis `dim` the weights are."""

ONNX_REGISTRATION_LOGGER = "torch.onnx._internal.exporter._registration"
"""Name of the logger by which the exporter says that torchvision is not there."""


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that two Python objects of one storage share; another one may get it when the storage is gone."""
    return storage._cdata


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place."""
    return tensor._version


def hook_dictionaries(module: Any) -> list[dict[int, Any]]:
    """Dictionaries of a module that fill up when somebody adds a hook; the numbers of two hooks are never the same."""
    return [hooks for name in _HOOKS if (hooks := getattr(module, name, None)) is not None]


def copy_with_hooks(base: nn.Module) -> nn.Module:
    """A copy with the very hooks of `base`: those that come later run on both, and those that go are gone from both."""
    names = [*_HOOKS, "_forward_hooks_always_called", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"]
    hooks = [getattr(module, name) for module in base.modules() for name in names]
    module = copy.deepcopy(base, {id(own): own for own in hooks})
    for part in module.modules():
        if part._is_full_backward_hook is None:
            part._is_full_backward_hook = True  # a backward hook that comes later tells this to `base` alone
    return module


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether anything looks at what the module gets or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Names of the module's own buffers that its state dict leaves out."""
    return module._non_persistent_buffers_set


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Remove the forward hooks of `module` that are methods of `owner`."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def gradient_hooks(parameter: Tensor) -> dict[int, Any]:
    """Hooks that run when the gradient is there (optimizers that step within the backward); the dictionary itself.

    An empty one of its own where there was never a hook.
    """
    hooks: dict[int, Any] | None = parameter._post_accumulate_grad_hooks
    return {} if hooks is None else hooks


def step_hook_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Attributes of the optimizer that hold hooks around its step."""
    return [name for name in vars(optimizer) if name.startswith("_optimizer_step_")]


def leave_to_ddp(model: nn.Module, ignored: Iterable[str]) -> None:
    """Tell DistributedDataParallel which parameters and buffers it shall leave alone, by name; none = take it back."""
    names = list(ignored)
    if names:
        setattr(model, _IGNORED_BY_DDP, names)
    else:
        vars(model).pop(_IGNORED_BY_DDP, None)


def no_memory() -> FakeTensorMode:
    """A context in which tensors have no memory: shape, dtype and device alone, on devices that need not exist.

    All that meets comes from the same one, which may be entered again.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)  # constants of a compiled graph are real


def saved_in_node(node: Any) -> Iterator[Tensor]:
    """Tensors that a node of autograd's graph keeps for its backward."""
    saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    for value in (*saved, *getattr(node, "saved_tensors", ())):
        yield from (t for t in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(t, Tensor))


def recompile_limit(limit: int) -> AbstractContextManager[Any]:
    """A context in which Dynamo compiles one function up to `limit` times."""
    context: AbstractContextManager[Any] = torch._dynamo.config.patch(
        recompile_limit=limit, accumulated_recompile_limit=limit
    )
    return context


def activation_memory_budget() -> float:
    """Share of what a compiled graph would keep for backward that it may keep; 1 = all (torch's default)."""
    return float(torch._functorch.config.activation_memory_budget)


def flop_formula(operator: Any, own: dict[Any, Callable[..., int]]) -> Callable[..., int] | None:
    """The formula of an operator that a dispatch mode sees, from `own` or torch's registry, or None."""
    packet = operator._overloadpacket
    return own.get(packet) or flop_registry.get(packet)


def takes_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """Mark a formula for `FlopCounterMode` as one that takes tensors, not shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


__all__ = [
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "MODULES",
    "ONNX_REGISTRATION_LOGGER",
    "PARAMETERS",
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
