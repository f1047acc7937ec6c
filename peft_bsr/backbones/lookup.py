"""Look up the functions with which an attention module attends and rotates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from peft_bsr.compat.transformers_api import (
    EAGER_ATTENTION,
    ROTATE,
    AttentionFunction,
    attention_functions,
    function_of,
)
from peft_bsr.errors import UnsupportedModelError

_ROTATE_TIMM = "apply_rot_embed_cat"  # (query or key, table of sine and cosine) -> query or key


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


def rotation_of(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`(query, key, *tables) -> (query, key)`: rotary embedding as this attention does it, or None."""
    rotate = function_of(attention, ROTATE)
    one = function_of(attention, _ROTATE_TIMM) if rotate is None else None
    return rotate if one is None else partial(_rotate_patches, attention, one)


def _rotate_patches(
    attention: nn.Module, rotate: Callable[..., Tensor], query: Tensor, key: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """timm's: the tokens after the special ones, by a table [.., N, 2 d] of sine and cosine."""
    first = attention.num_prefix_tokens
    layout = {"half": True} if getattr(attention, "rotate_half", False) else {}
    query, key = (
        torch.cat([part[:, :, :first], rotate(part[:, :, first:], table, **layout)], dim=2).type_as(part)
        for part in (query, key)
    )
    return query, key


__all__ = ["attention_function", "rotation_of"]
