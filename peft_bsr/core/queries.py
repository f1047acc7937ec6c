"""Queries beside a frozen attention's own tokens (SynQT, arXiv 2407.06964), its key and value projections absorbed.

`softmax(q . (Wk x + bk)) (Wv x + bv)` over tokens x needs neither keys nor values: `q . (Wk x)` is `(Wk^T q) . x`, the
product with `bk` is the same for all tokens, so that softmax does not see it, and as the weights sum to one, `Wv` and
`bv` may be applied to the pooled token. What is left of the tokens is the tokens themselves.

Shapes: B images, N tokens, Q queries, H heads, d head width, D width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def absorb_key(query: Tensor, key_weight: Tensor, num_heads: int) -> Tensor:
    """`Wk^T q` of every head: what scores tokens without making keys of them.

    Args:
        query: [B, Q, H * d], behind the query projection.
        key_weight: [H * d, D], of the key projection; its bias does not matter.
        num_heads: H.

    Returns:
        [B, Q * H, D], a query's heads beside each other.
    """
    batch, num_queries, _ = query.shape
    per_head = query.unflatten(2, (num_heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    absorbed = torch.bmm(per_head, key_weight.unflatten(0, (num_heads, -1)))
    return absorbed.unflatten(1, (batch, num_queries)).permute(1, 2, 0, 3).flatten(1, 2)


def pooling_weights(query: Tensor, tokens: Tensor, scaling: float, hidden: Tensor | None = None) -> Tensor:
    """`softmax(query . token * scaling)` over the tokens; in fp32 at least, as in eager attention.

    Args:
        query: [B, R, D], any number of rows R.
        tokens: [B, N, D].
        scaling: Factor on the products.
        hidden: [B, N] bool, True where a token is padding, or None.

    Returns:
        [B, R, N], rows sum to 1, in the dtype of `query`.
    """
    logits = torch.bmm(query, tokens.transpose(1, 2)) * scaling
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None], -torch.inf)
    return logits.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)


def apply_value(pooled: Tensor, value_weight: Tensor, value_bias: Tensor | None, num_heads: int) -> Tensor:
    """The value projection on pooled tokens, each head's part on its own.

    Args:
        pooled: [B, Q * H, D], as `absorb_key` orders them.
        value_weight: [H * d, D].
        value_bias: [H * d] or None.
        num_heads: H.

    Returns:
        [B, Q, H * d].
    """
    per_query = pooled.unflatten(1, (-1, num_heads))
    batch, num_queries = per_query.shape[:2]
    per_head = per_query.permute(2, 0, 1, 3).flatten(1, 2)
    values = torch.bmm(per_head, value_weight.unflatten(0, (num_heads, -1)).transpose(1, 2))
    joined = values.unflatten(1, (batch, num_queries)).permute(1, 2, 0, 3).flatten(2)
    return joined if value_bias is None else joined + value_bias


def attend_plain(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, scaling: float, hidden: Tensor | None = None
) -> Tensor:
    """Queries on keys and values, as any attention has it.

    Args:
        query: [B, Q, H * d].
        key: [B, N, H * d].
        value: [B, N, H * d].
        num_heads: H.
        scaling: Factor on the products, usually `d ** -0.5`.
        hidden: [B, N] bool, True where a token is padding, or None.

    Returns:
        [B, Q, H * d].

    Examples:
        >>> q, x = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
        >>> attend_plain(q, x, x, num_heads=4, scaling=2**-0.5).shape
        torch.Size([2, 3, 8])
    """
    q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    rows = None if hidden is None else hidden.repeat_interleave(num_heads, dim=0)
    mixed = torch.bmm(pooling_weights(q, k, scaling, rows), v)
    return mixed.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


def hidden_tokens(mask: Tensor | None) -> Tensor | None:
    """Which tokens an attention mask hides from every query, None where it hides none by itself.

    Args:
        mask: [B, N] (nonzero = visible), or boolean (True = visible) or additive [B, 1 or H, 1 or N, N], or None.

    Returns:
        [B, N] bool, or None without a mask. A finite bias hides nothing.
    """
    if mask is None:
        return None
    row = mask if mask.ndim == 2 else mask[:, 0, 0]
    return row <= torch.finfo(row.dtype).min / 2 if row.is_floating_point() else ~row.bool()
