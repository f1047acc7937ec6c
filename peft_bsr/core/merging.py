"""Merges similar tokens (ToMe, arXiv 2210.09461). Nothing is dropped, so no scores are needed.

Shapes: B images, N tokens: P prefix, M others and S suffix tokens, K of the M are left, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from peft_bsr.core.reduction import select_tokens


def sum_tokens(tokens: Tensor, place: Tensor, weights: Tensor, left: int) -> Tensor:
    """Weighted sums of tokens by target index, [B, N, D] -> [B, left, D]. Keeps no tokens for backward.

    Args:
        tokens: [B, N, D].
        place: Target index of each token, [B, N] int64, from 0 to `left` - 1.
        weights: [B, N], without gradients.
        left: Number of sums.
    """
    weighted = tokens * weights[..., None]
    # not `index_add`, which keeps its source for backward
    return torch.zeros_like(weighted[:, :left]).scatter_add(1, place[..., None].expand_as(weighted), weighted)


def merge_tokens(
    hidden_states: Tensor,
    origins: Tensor,
    merged: Tensor,
    num_prefix: int,
    keep: int,
    num_suffix: int = 0,
    sums: Callable[[Tensor, Tensor, Tensor, int], Tensor] = sum_tokens,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge similar tokens until `keep` non-special tokens are left.

    Each token at an even position is matched to its most similar token at an odd position, by the cosine of the
    detached hidden states. The M - K most similar pairs merge: the token at the odd position becomes the mean of all
    tokens matched to it and itself, weighted by the number of patches in each. Gradients flow through the means, not
    through the matching. One round removes at most half of the tokens; further rounds work on the means.

    Source: arXiv 2210.09461. Differences: docs/bsr.md.

    Args:
        hidden_states: [B, P + M + S, D].
        origins: `Route.origins`, [B, M], ascending.
        merged: `Route.merged`, the origin of the token that contains each patch, [B, patches].
        num_prefix: Number of special tokens at the front, P.
        keep: Number of tokens left, K, a Python integer of at least 1. With K = M the inputs are returned unchanged.
        num_suffix: Number of special tokens at the end, S. Default 0.
        sums: Function that sums the tokens. Default `sum_tokens`.

    Returns:
        hidden states [B, P + K + S, D], origins [B, K] and merged [B, patches].

    Examples:
        >>> tokens, patches = torch.tensor([[[1.0, 0], [0, 1], [2, 0], [3, 0]]]), torch.arange(4)[None]
        >>> tokens, origins, merged = merge_tokens(tokens, patches, patches, 0, 3)
        >>> origins, merged
        (tensor([[1, 2, 3]]), tensor([[3, 1, 2, 3]]))
        >>> tokens[0, 2]  # the mean of the first and the last
        tensor([2., 0.])
    """
    while (num_tokens := origins.shape[1]) > keep:
        left = max(keep, num_tokens - num_tokens // 2)
        end = hidden_states.shape[1] - num_suffix
        goes_to = _matched(hidden_states[:, num_prefix:end].detach(), num_tokens - left)
        place, kept = _places(goes_to, left)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        weights = _weights(origins, merged, place, left, dtype).to(hidden_states.dtype)
        weights = pad(weights, (num_prefix, num_suffix), value=1.0)
        place = _with_special(place, num_prefix, left, num_suffix)
        hidden_states = sums(hidden_states, place, weights, num_prefix + left + num_suffix)
        # patches move with their token
        moved = merged.scatter(1, origins, origins.gather(1, goes_to))
        origins, merged = origins.gather(1, kept), moved.gather(1, merged)
    return hidden_states, origins, merged


def _matched(tokens: Tensor, num_merged: int) -> Tensor:
    """Target of each of the tokens [B, M, D]: its own index, or that of the token it merges into, [B, M]."""
    seeking, found = tokens[:, ::2], normalize(tokens[:, 1::2], dim=2)
    nearest, partner = (seeking @ found.transpose(1, 2)).max(dim=2)
    cosine = nearest / seeking.norm(dim=2).clamp_min(torch.finfo(tokens.dtype).tiny)
    chosen = select_tokens(cosine, num_merged)[0]
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    return places.scatter(1, 2 * chosen, 2 * partner.gather(1, chosen) + 1)


def _places(goes_to: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """New index of each token [B, M], and the old indices of the tokens that are left [B, K], ascending."""
    stays = goes_to == torch.arange(goes_to.shape[1], device=goes_to.device)
    place = (stays.long().cumsum(dim=1) - 1).gather(1, goes_to)
    return place, torch.zeros_like(goes_to[:, :left]).scatter(1, place, goes_to)


def _with_special(place: Tensor, num_prefix: int, left: int, num_suffix: int) -> Tensor:
    """New indices of all tokens including special ones, [B, P + M + S]."""
    prefix, suffix = torch.arange(num_prefix), torch.arange(num_suffix) + num_prefix + left
    parts = [special.to(place.device).expand(place.shape[0], -1) for special in (prefix, suffix)]
    return torch.cat([parts[0], place + num_prefix, parts[1]], dim=1)


def _weights(origins: Tensor, merged: Tensor, place: Tensor, left: int, dtype: torch.dtype) -> Tensor:
    """Weight of each token in the mean, its share of the patches, [B, M]."""
    held = torch.zeros_like(merged).scatter_add(1, merged, torch.ones_like(merged)).gather(1, origins)
    total = torch.zeros_like(place[:, :left]).scatter_add(1, place, held)
    return held.to(dtype) / total.gather(1, place)


__all__ = ["merge_tokens", "sum_tokens"]
