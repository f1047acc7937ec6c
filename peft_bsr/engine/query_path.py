"""A frozen block read by queries: its own weights work on a few learned tokens, its own tokens do not change.

Only queries run through the block's query and output projections, norms and MLP; gradients cross those for them alone.
Of the block's tokens one normalised tensor is kept for backward, in the dtype asked for. Queries stand nowhere in the
image, so they read content alone: rotary tables are not applied to them nor to the keys that they read, and relative
position biases are left out. Masks of padding are followed.

Shapes: B images, N tokens, T queries, H heads, d head width, D width.
"""

from __future__ import annotations

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
    """How blocks are read.

    Attributes:
        spec: Knows their parts.
        absorbs: Whether key and value projections are absorbed, so that only tokens are kept; else keys and values are.
        kept: How absorbed projections keep the tokens for backward: as they are, or rounded, `"int8"` to 256 steps. The
            forward always uses them as they are; keys and values are never rounded.
    """

    spec: ModelSpec
    absorbs: bool = True
    kept: KeptTokens = "full"

    @property
    def exact_names(self) -> tuple[str, ...]:
        """Roles of the projections that are absorbed: plain weights, which nobody may round."""
        return ("attention.key", "attention.value") if self.absorbs else ()

    def tokens_of(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        """What queries read: LN1 of the block's input [B, N, D], without a graph."""
        assert self.spec.block_spec is not None, "only blocks whose parts are known are read"
        with torch.no_grad():
            return apply_part(block, self.spec.block_spec.norm1, hidden_states)

    def read(
        self, block: nn.Module, queries: Tensor, tokens: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the block makes of the queries.

        Args:
            block: Frozen.
            queries: [B, T, D].
            tokens: [B, N, D], see `tokens_of`; any floating dtype.
            hidden: [B, N] bool, True where a token is padding, or None.

        Returns:
            F_att [B, T, D], the attention's part, and F_ffn [B, T, D], the MLP's: the block's output for the queries
            is their sum with them. LayerScale and DropPath are the block's own.
        """
        block_spec = self.spec.block_spec
        assert block_spec is not None, "only blocks whose parts are known are read"
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
        ask, key, value, output = projections(block, spec)
        query, heads, scaling = ask(queries), spec.num_heads, spec.scaling
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
    """The block's query, key, value and output projections; None where it has not got that one."""
    param_modules = {role: block.get_submodule(leaf) for role, leaf in spec.paths.items()}
    return [param_modules.get(f"attention.{role}") for role in ROLES]


def attention_mask(spec: ModelSpec, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that a block is called with, if it is a tensor."""
    names = () if spec.block_spec is None else spec.block_spec.block_inputs
    mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
    return mask if isinstance(mask, Tensor) else None


def pool_tokens(
    query: Tensor, tokens: Tensor, scaling: float, hidden: Tensor | None = None, kept: KeptTokens = "full"
) -> Tensor:
    """`softmax(query . token * scaling)` times the tokens; gradients reach the query alone.

    Args:
        query: [B, R, D], absorbed queries.
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
    """What the block computes in; autocast casts by itself."""
    if torch.is_autocast_enabled(like.device.type):
        return like.dtype
    return next((p.dtype for p in exact_parameters(block)), like.dtype)


__all__ = ["ROLES", "QueryPath", "attention_mask", "pool_tokens", "projections"]
