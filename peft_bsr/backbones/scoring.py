"""Class-token scores from the query and key that attention really uses, whichever implementation runs.

transformers looks the attention function up by `attention.config._attn_implementation` at each call. A scoring layer
gets a view of its config that answers with a twin of the configured name; the twin runs the configured function and
returns the class token's attention row in the place of the attention weights. Nothing is stored between calls, the
model's own config is untouched (so masks are still made for the configured implementation), and
`model.set_attn_implementation` keeps working. Hooks on the q and k projections would be wrong wherever something
sits between projection and product (row error 5e-2 on DINOv3, 1e-2 on BEiT).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_bsr.core import class_attention

_TWIN_PREFIX = "class_row|"


def attention_with_class_row(
    implementation: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Run `implementation` and report the class token's attention beside its output.

    Args:
        implementation: Name known to transformers' `AttentionInterface`, or `"eager"`.
        module: The attention module.
        query: [B, H, N, d].
        key: [B, H, N, d].
        value: [B, H, N, d].
        attention_mask: As the implementation takes it; 4-D masks also apply to the scores.
        scaling: Factor on the products; None = d ** -0.5.
        dropout: Dropout on the attention weights.
        **kwargs: For the implementation.

    Returns:
        The implementation's output, and weights [B, H, Q, N] whose row 0 is the class token's (Q = 1 where the
        implementation reports none, else its own rows). With dropout row 0 is the one before dropout.
    """
    if implementation in (None, "eager"):
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
    output, weights = attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if weights is not None and not dropout:
        return output, weights
    dense_mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 else None
    row = class_attention(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, dense_mask)
    return output, row if weights is None else torch.cat([row, weights[:, :, 1:]], dim=2)


class ScoringConfig:
    """A view of an attention module's config that names the scoring twin while `is_scoring()` holds.

    Args:
        config: The config to look through; it stays shared with the rest of the model.
        is_scoring: Called at each look-up.
    """

    def __init__(self, config: Any, is_scoring: Callable[[], bool]) -> None:
        self.config = config
        self.is_scoring = is_scoring

    @property
    def _attn_implementation(self) -> str | None:
        implementation = self.config._attn_implementation
        return _twin(implementation) if self.is_scoring() else implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # copying and pickling ask before `config` is there
            raise AttributeError(name)
        return getattr(self.config, name)


class _EagerConfig(ScoringConfig):
    @property
    def _attn_implementation(self) -> str | None:
        return "eager"


@contextmanager
def unscored(attention: Any) -> Iterator[None]:
    """Make `attention` run transformers' explicit softmax, whatever is configured: the reference for scores."""
    config = attention.config
    base = config.config if isinstance(config, ScoringConfig) else config
    attention.config = _EagerConfig(base, lambda: False)
    try:
        yield
    finally:
        attention.config = config


def _twin(implementation: str | None) -> str:
    name = f"{_TWIN_PREFIX}{implementation}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(attention_with_class_row, implementation))
    return name
