"""Learned queries that run through a frozen block with its weights and attend to its tokens, which do not change.

Only the queries run through the block's query and output projections, norms and MLP, and only they have gradients
there. Of the block's tokens, one normalised tensor is kept for backward, in the chosen dtype. Queries have no position
in the image: rotary tables are applied neither to them nor to the keys they attend to, and relative position biases are
left out. Padding masks apply.

Shapes: B images, N tokens, T queries, H heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft_bsr.backbones import ModelSpec, apply_part
from peft_bsr.core import absorb_key, apply_value, attend_plain, pooling_weights
from peft_bsr.engine.kept_tokens import KeptTokens, keep_tokens, restore_tokens
from peft_bsr.ops import exact_parameters

ROLES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class QueryPath:
    """How queries read blocks.

    Attributes:
        spec: Description of the model.
        absorbs: Whether key and value projections are absorbed, so that tokens are kept instead of keys and values.
        kept: How tokens are kept for backward if projections are absorbed: in full or rounded, `"int8"` to 256 steps.
            The forward does not round them; keys and values are never rounded.
    """

    spec: ModelSpec
    absorbs: bool = True
    kept: KeptTokens = "full"

    @property
    def exact_names(self) -> tuple[str, ...]:
        """Canonical names of the absorbed projections. Their weights must not be quantised."""
        return ("attention.key", "attention.value") if self.absorbs else ()

    def tokens_of(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        """The tokens that queries attend to: norm1 of the block's input [B, N, D], without a graph."""
        assert self.spec.block_spec is not None, "only blocks with known parts are read"
        with torch.no_grad():
            return apply_part(block, self.spec.block_spec.norm1, hidden_states)

    def read(
        self, block: nn.Module, queries: Tensor, tokens: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the queries through the block.

        Args:
            block: The frozen block.
            queries: [B, T, D].
            tokens: [B, N, D], see `tokens_of`; any floating dtype.
            hidden: [B, N] bool, True where a token is padding, or None.

        Returns:
            F_att [B, T, D] of the attention half and F_ffn [B, T, D] of the MLP half, after the block's LayerScale and
            DropPath. `queries + F_att + F_ffn` is the block's output.
        """
        block_spec = self.spec.block_spec
        assert block_spec is not None, "only blocks with known parts are read"
        mine = queries.to(_dtype_of(block, queries))
        attended = self.attend(block, apply_part(block, block_spec.norm1, mine), tokens, hidden)
        for name in block_spec.after_attention:
            attended = apply_part(block, name, attended)
        state = mine + attended
        expanded = apply_part(block, block_spec.norm2, state)
        for name in block_spec.mlp[:-1]:
            expanded = apply_part(block, name, expanded)
        nothing = (torch.zeros_like(state),) if block_spec.mlp_adds_residual else ()
        expanded = apply_part(block, block_spec.mlp[-1], expanded, *nothing)
        for name in () if block_spec.mlp_adds_residual else block_spec.after_mlp:
            expanded = apply_part(block, name, expanded)
        return attended.to(queries.dtype), expanded.to(queries.dtype)

    def attend(self, block: nn.Module, queries: Tensor, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """The attention's output [B, T, D] for normalised queries [B, T, D]."""
        spec = self.spec
        project, key, value, output = projections(block, spec)
        query, heads, scaling = project(queries), spec.num_heads, spec.scaling
        if self.absorbs:
            absorbed = absorb_key(query, key.weight, heads)
            pooled = pool_tokens(absorbed, tokens, scaling, hidden, self.kept)
            mixed = apply_value(pooled, value.weight, value.bias, heads)
        else:
            with torch.no_grad():
                tokens = tokens.to(_dtype_of(block, tokens))
                keys, values = key(tokens), value(tokens)
            mixed = attend_plain(query, keys, values, heads, scaling, hidden)
        attended: Tensor = output(mixed)
        return attended


def projections(block: nn.Module, spec: ModelSpec) -> list[Any]:
    """The block's query, key, value and output projections, None for each that it does not have."""
    param_modules = {role: block.get_submodule(leaf) for role, leaf in spec.paths.items()}
    return [param_modules.get(f"attention.{role}") for role in ROLES]


def attention_mask(spec: ModelSpec, args: Iterable[object], kwargs: Mapping[str, object]) -> Tensor | None:
    """The attention mask among a block's arguments, or None if there is none or it is not a tensor."""
    names = () if spec.block_spec is None else spec.block_spec.block_inputs
    mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


def pool_tokens(
    query: Tensor, tokens: Tensor, scaling: float, hidden: Tensor | None = None, kept: KeptTokens = "full"
) -> Tensor:
    """`softmax(query . token * scaling)` times the tokens; only the query has gradients.

    Args:
        query: Absorbed queries [B, R, D].
        tokens: [B, N, D], any floating dtype.
        scaling: Factor on the products.
        hidden: [B, N] bool, True where a token is padding, or None.
        kept: How the tokens are kept for backward.

    Returns:
        [B, R, D] in the dtype of `query`.
    """
    pooled: Tensor = _PooledTokens.apply(query, tokens, scaling, hidden, kept)
    return pooled


class _PooledTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, tokens: Tensor, scaling: float, hidden: Tensor | None, kept: KeptTokens
    ) -> Tensor:
        values = tokens.to(query.dtype)
        weights = pooling_weights(query, values, scaling, hidden)
        ctx.save_for_backward(weights, *keep_tokens(tokens, kept))
        ctx.scaling, ctx.shape, ctx.dtype = scaling, tokens.shape, tokens.dtype
        return torch.bmm(weights, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, *packed = ctx.saved_tensors
        values = restore_tokens(tuple(packed), ctx.shape, ctx.dtype).to(gradient.dtype)
        into = torch.bmm(gradient, values.transpose(1, 2))
        into = weights * (into - (into * weights).sum(dim=-1, keepdim=True))
        return torch.bmm(into, values) * ctx.scaling, None, None, None, None


def _dtype_of(block: nn.Module, like: Tensor) -> torch.dtype:
    """The block's compute dtype; under autocast, the dtype of `like`, because autocast casts it."""
    if torch.is_autocast_enabled(like.device.type):
        return like.dtype
    return next((p.dtype for p in exact_parameters(block)), like.dtype)


__all__ = ["ROLES", "QueryPath", "attention_mask", "pool_tokens", "projections"]
