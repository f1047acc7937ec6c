"""What transformers has for a module beside it: its attention function, and the hooks that capture outputs."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_bsr.errors import UnsupportedModelError

_CAPTURING = "transformers.utils.output_capturing"


def is_capture_hook(hook: Any) -> bool:
    """Whether a forward hook is one of those by which transformers captures hidden states and attention weights."""
    return getattr(hook, "__module__", None) == _CAPTURING


def captured_outputs() -> frozenset[str]:
    """What the running forward captures (`"hidden_states"`, `"attentions"`); transformers' hooks outlast a request."""
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return frozenset((collector.get() or ()) if collector is not None else ())


def function_of(module: nn.Module, name: str) -> Any:
    """The function `name` that the forward of `module` finds beside itself in its file.

    A class may inherit its forward, or call that of its base class, from another file.

    Args:
        module: An attention.
        name: `"eager_attention_forward"`, `"apply_rotary_pos_emb"`.

    Returns:
        The function, or None if no class of `module` with a forward has one beside it.
    """
    files = [sys.modules.get(cls.__module__) for cls in type(module).__mro__ if "forward" in vars(cls)]
    return next((getattr(file, name) for file in files if hasattr(file, name)), None)


def attention_function(module: Any, implementation: str | None) -> Any:
    """The function of that name; a module's own eager one where there is none."""
    if implementation not in (None, "eager"):
        return ALL_ATTENTION_FUNCTIONS[implementation]
    function = function_of(module, "eager_attention_forward")
    if function is None:
        raise UnsupportedModelError(
            f"the files of {type(module).__name__} and its base classes have no `eager_attention_forward`, as "
            "transformers' own have; name the function so, or load the model with `attn_implementation='sdpa'`"
        )
    return function


__all__ = ["attention_function", "captured_outputs", "function_of", "is_capture_hook"]
