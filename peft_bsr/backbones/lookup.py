"""The attention function that runs for an attention of transformers."""

from __future__ import annotations

from typing import Any

from peft_bsr.compat.transformers_api import EAGER_ATTENTION, attention_functions, function_of
from peft_bsr.errors import UnsupportedModelError


def attention_function(module: Any, implementation: str | None) -> Any:
    """The function of that name; a module's own eager one where there is none."""
    if implementation is not None and implementation != "eager":
        return attention_functions[implementation]
    function = function_of(module, EAGER_ATTENTION)
    if function is None:
        raise UnsupportedModelError(
            f"the files of {type(module).__name__} and its base classes have no `{EAGER_ATTENTION}`, as "
            "transformers' own have; name the function so, or load the model with `attn_implementation='sdpa'`"
        )
    return function


__all__ = ["attention_function"]
