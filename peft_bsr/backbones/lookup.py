"""Look up the attention function of a transformers attention module."""

from __future__ import annotations

from torch import nn

from peft_bsr.compat.transformers_api import EAGER_ATTENTION, AttentionFunction, attention_functions, function_of
from peft_bsr.errors import UnsupportedModelError


def attention_function(module: nn.Module, implementation: str | None) -> AttentionFunction:
    """The registered function of that name; for None or `"eager"` the module's own."""
    if implementation is not None and implementation != "eager":
        return attention_functions[implementation]
    function = function_of(module, EAGER_ATTENTION)
    if function is None:
        raise UnsupportedModelError(
            f"the files of {type(module).__name__} and its base classes have no function `{EAGER_ATTENTION}`, as those "
            "of transformers have; give the function this name, or load the model with `attn_implementation='sdpa'`"
        )
    return function


__all__ = ["attention_function"]
