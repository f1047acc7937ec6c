"""Attention of the class token. Shapes: B images, H heads, N tokens, d head width."""

from __future__ import annotations

import torch
from torch import Tensor


def class_attention(query: Tensor, key: Tensor, scaling: float, attention_mask: Tensor | None = None) -> Tensor:
    """Row of the class token (token 0) in `softmax(Q K^T * scaling + mask)`.

    The row depends on one query only, so it costs 2 N d FLOPs a head (0.01 % of a ViT-B block) and no N x N tensor.

    Args:
        query: [B, H, N, d], the very tensor that the attention uses (after rotation or normalisation, if any).
        key: [B, H, N, d], likewise.
        scaling: Factor on the products, usually `d ** -0.5`.
        attention_mask: Additive float or boolean (True = visible) mask that broadcasts to [B, H, N, N], or None.

    Returns:
        [B, H, 1, N], rows sum to 1, in the dtype of `query` (the softmax runs in fp32 at least, as in eager attention).

    Example:
        >>> q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
        >>> class_attention(q, k, 4**-0.5).shape
        torch.Size([2, 3, 1, 5])
    """
    # a product and a sum, because `@` would keep a contiguous copy of the key for backward (1 MiB/image on ViT-B)
    logits = (query[:, :, :1] * key).sum(dim=-1)[:, :, None] * scaling
    if attention_mask is not None:
        row_mask = attention_mask[:, :, :1]
        if row_mask.dtype == torch.bool:
            logits = logits.masked_fill(~row_mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + row_mask
    return logits.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
