"""Token scores from attention. Shapes: B images, H heads, N tokens, P prefix tokens, d head width."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

ScoreKind = Literal["class", "mean_query", "received"]
CLASS_FREE_SCORE: ScoreKind = "mean_query"  # for models without a class token
SCORE_KINDS: tuple[str, ...] = get_args(ScoreKind)


def token_scores(kind: str, query: Tensor, key: Tensor, scaling: float, attention_mask: Tensor | None = None) -> Tensor:
    """How much each token is attended to, mean over heads.

    - `"class"`: the row of the class token (token 0) in `softmax(Q K^T * scaling + mask)`, the score of BSR.
    - `"mean_query"`: the row of the mean of all queries, for models without a class token.
    - `"received"`: the mean of all rows, also for models without a class token. Computes the whole N x N product.

    The first two use one query, so they cost 2 N d FLOPs per head (0.01 % of a ViT-B block) and no N x N tensor.

    Args:
        kind: One of the above.
        query: [B, H, N, d], as the attention uses it (after rotation or normalization, if any).
        key: [B, H, N, d], likewise.
        scaling: Factor on the products, usually `d ** -0.5`.
        attention_mask: Additive float or boolean (True = visible) mask that broadcasts to [B, H, N, N], or None.

    Returns:
        [B, N], rows sum to 1, in the dtype of `query` (the softmax runs in fp32 at least, as in eager attention).

    Examples:
        >>> q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
        >>> token_scores("class", q, k, 4**-0.5).shape
        torch.Size([2, 5])
    """
    if kind == "received":
        rows = _attend(query, key, scaling, attention_mask)
        return mean_of_visible(rows, attention_mask).squeeze(2).mean(dim=1)
    one = query[:, :, :1] if kind == "class" else mean_of_visible(query, attention_mask)
    row_mask = None if attention_mask is None else attention_mask[:, :, :1]
    return _attend(one, key, scaling, row_mask).squeeze(2).mean(dim=1)


def weights_to_scores(kind: str, weights: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
    """`token_scores` from attention weights [B, H, N, N], or None for a kind that needs queries."""
    if kind == "mean_query":
        return None
    return (weights[:, :, 0] if kind == "class" else mean_of_visible(weights, attention_mask)[:, :, 0]).mean(dim=1)


def _attend(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Softmax rows [B, H, Q, N] of the queries [B, H, Q, d]."""
    if query.shape[2] == 1:
        # a product and a sum, because `@` would keep a contiguous copy of the key for backward (1 MiB/image on ViT-B)
        logits = (query * key).sum(dim=-1)[:, :, None] * scaling
    else:
        logits = query @ key.transpose(2, 3) * scaling
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)


def mean_of_visible(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens [B, H, N, x] -> [B, H, 1, x], without the padding that the mask hides from token 0."""
    if mask is None:
        return values.mean(dim=2, keepdim=True)
    first_row = mask[:, :, 0]
    visible = first_row if mask.dtype == torch.bool else first_row > torch.finfo(mask.dtype).min / 2
    weight = visible.to(values.dtype)[..., None]
    return (values * weight).sum(dim=2, keepdim=True) / weight.sum(dim=2, keepdim=True).clamp_min(1)
