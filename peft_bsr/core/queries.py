"""Attention of additional queries to a frozen block's tokens (SynQT, arXiv 2407.06964), without keys and values.

`softmax(q . (Wk x + bk)) (Wv x + bv)` over tokens x needs neither keys nor values: `q . (Wk x)` is `(Wk^T q) . x`; the
product with `bk` is the same for all tokens, so it cancels in the softmax; and because the weights sum to one, `Wv` and
`bv` can be applied to the pooled token. Only the tokens themselves are kept for backward.

Shapes: B images, N tokens, Q queries, H heads, d head width, D width of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def absorb_key(query: Tensor, key_weight: Tensor, num_heads: int) -> Tensor:
    """`Wk^T q` of every head, which scores tokens without computing their keys.

    Args:
        query: Output of the query projection, [B, Q, H * d].
        key_weight: Weight of the key projection, [H * d, D]. Its bias has no effect.
        num_heads: Number of heads, H.

    Returns:
        [B, Q * H, D], with the heads of each query next to each other.
    """
    batch, num_queries, _ = query.shape
    per_head = query.unflatten(2, (num_heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    absorbed = torch.bmm(per_head, key_weight.unflatten(0, (num_heads, -1)))
    return absorbed.unflatten(1, (batch, num_queries)).permute(1, 2, 0, 3).flatten(1, 2)


def pooling_weights(query: Tensor, tokens: Tensor, scaling: float, hidden: Tensor | None = None) -> Tensor:
    """`softmax(query . token * scaling)` over the tokens, in fp32 or wider, as in eager attention.

    Args:
        query: [B, R, D], with any number of rows R.
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
    """Apply the value projection to pooled tokens, separately for each head.

    Args:
        pooled: Pooled tokens, [B, Q * H, D], in the order of `absorb_key`.
        value_weight: Weight of the value projection, [H * d, D].
        value_bias: Its bias [H * d], or None.
        num_heads: Number of heads, H.

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
    """Scaled dot-product attention of queries to keys and values.

    Args:
        query: [B, Q, H * d].
        key: [B, N, H * d].
        value: [B, N, H * d].
        num_heads: Number of heads, H.
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
    """Which tokens an attention mask hides from all queries.

    Args:
        mask: [B, N] (nonzero = visible), or boolean (True = visible) or additive [B, 1 or H, 1 or N, N], or None.

    Returns:
        [B, N] bool, or None without a mask. A finite bias hides nothing.
    """
    if mask is None:
        return None
    row = mask if mask.ndim == 2 else mask[:, 0, 0]
    return row <= torch.finfo(row.dtype).min / 2 if row.is_floating_point() else ~row.bool()
