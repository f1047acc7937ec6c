"""Merging of similar tokens, after token merging (ToMe, arXiv 2210.09461): nothing is dropped, so no score is needed.

Shapes: B images, N tokens of which the first P are the prefix and the last S a suffix, M = N - P - S others, K of them
left, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from peft_bsr.core.reduction import select_tokens


def sum_tokens(tokens: Tensor, place: Tensor, weights: Tensor, left: int) -> Tensor:
    """Weighted sums of tokens by place, [B, N, D] -> [B, left, D]; no token is kept for backward.

    Args:
        tokens: [B, N, D].
        place: [B, N] int64, in 0 to `left` - 1.
        weights: [B, N], no gradient goes to them.
        left: How many there are.
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
    """Merge similar tokens until `keep` of those that are not special are left; each takes the place of its partner.

    The tokens at even places look for their most similar one at the odd places, by the cosine of the detached hidden
    states. The M - K most similar pairs merge: at the odd place stands the mean of all that came together there,
    weighted by how many patches each of them holds. Gradients flow through the means, never through the choice. A round
    takes away half of the tokens at most; for fewer there is another one, on the means.

    Source: arXiv 2210.09461. Departures: docs/bsr.md.

    Args:
        hidden_states: [B, P + M + S, D].
        origins: [B, M], the patch in whose place each token stands (see `Route`), ascending.
        merged: [B, patches], the origin of the token that holds each patch.
        num_prefix: P.
        keep: K, static, at least 1. With K = M the very inputs are returned.
        num_suffix: S.
        sums: What sums the tokens up, see `sum_tokens`.

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
        # patches follow the token that they were part of
        moved = merged.scatter(1, origins, origins.gather(1, goes_to))
        origins, merged = origins.gather(1, kept), moved.gather(1, merged)
    return hidden_states, origins, merged


def _matched(tokens: Tensor, num_merged: int) -> Tensor:
    """[B, M], where each of the tokens [B, M, D] goes: to itself, or to its partner if it merges."""
    seeking, found = tokens[:, ::2], normalize(tokens[:, 1::2], dim=2)
    nearest, partner = (seeking @ found.transpose(1, 2)).max(dim=2)
    cosine = nearest / seeking.norm(dim=2).clamp_min(torch.finfo(tokens.dtype).tiny)
    chosen = select_tokens(cosine, num_merged)[0]
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    return places.scatter(1, 2 * chosen, 2 * partner.gather(1, chosen) + 1)


def _places(goes_to: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """For each token [B, M] its place among those left; and the former places of these [B, K], ascending."""
    stays = goes_to == torch.arange(goes_to.shape[1], device=goes_to.device)
    place = (stays.long().cumsum(dim=1) - 1).gather(1, goes_to)
    return place, torch.zeros_like(goes_to[:, :left]).scatter(1, place, goes_to)


def _with_special(place: Tensor, num_prefix: int, left: int, num_suffix: int) -> Tensor:
    """[B, P + M + S], places of all tokens; special ones stay beside the others."""
    prefix, suffix = torch.arange(num_prefix), torch.arange(num_suffix) + num_prefix + left
    parts = [special.to(place.device).expand(len(place), -1) for special in (prefix, suffix)]
    return torch.cat([parts[0], place + num_prefix, parts[1]], dim=1)


def _weights(origins: Tensor, merged: Tensor, place: Tensor, left: int, dtype: torch.dtype) -> Tensor:
    """[B, M], the share of each token in the one that it becomes part of, by patches."""
    held = torch.zeros_like(merged).scatter_add(1, merged, torch.ones_like(merged)).gather(1, origins)
    total = torch.zeros_like(place[:, :left]).scatter_add(1, place, held)
    return held.to(dtype) / total.gather(1, place)


__all__ = ["merge_tokens", "sum_tokens"]
