"""Token reduction by class attention (BSR, arXiv 2405.10951, section on token dropping).

Shapes: B images, N tokens of which the first P are the prefix (class, distillation, registers), M = N - P others
(patches and earlier fused tokens), K of them kept, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def num_kept(keep_rate: float, num_tokens: int) -> int:
    """Tokens that survive: `ceil(keep_rate * num_tokens)`, in exact decimals (0.1 of 30 is 3, not 4).

    Args:
        keep_rate: In (0, 1].
        num_tokens: Tokens that compete (M), prefix not counted.
    """
    return math.ceil(round(keep_rate * num_tokens, 6))


def select_tokens(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of the `keep` highest scores and of the rest, each ascending, so that positions stay sorted.

    Args:
        scores: [B, M]. Ties go to the lower index.
        keep: K, static, 1 <= K <= M.

    Returns:
        kept [B, K] and dropped [B, M - K], int64.
    """
    ranking = scores.detach().argsort(dim=1, descending=True, stable=True)
    return ranking[:, :keep].sort(dim=1).values, ranking[:, keep:].sort(dim=1).values


def reduce_tokens(
    hidden_states: Tensor, origins: Tensor, scores: Tensor, num_prefix: int, keep: int, fused_origin: int | None
) -> tuple[Tensor, Tensor]:
    """Keep the prefix and the `keep` best other tokens; optionally append one token fused from the dropped ones.

    The fused token is the sum of the dropped tokens weighted by their class attention, not normalised, appended
    last; gradients flow through its values and weights, never through the choice of indices.

    Args:
        hidden_states: [B, N, D].
        origins: [B, M], where each non-prefix token comes from (see `Route`), ascending.
        scores: [B, M], class attention of the non-prefix tokens, mean over heads.
        num_prefix: P.
        keep: K. With K = M nothing is dropped and the very inputs are returned.
        fused_origin: Origin number of the fused token, or None to drop without fusing.

    Returns:
        hidden states [B, P + K (+ 1), D] and origins [B, K (+ 1)].
    """
    if keep == origins.shape[1]:
        return hidden_states, origins
    kept, dropped = select_tokens(scores, keep)
    prefix = torch.arange(num_prefix, device=kept.device).expand(len(kept), -1)
    tokens = [_pick_tokens(hidden_states, torch.cat([prefix, kept + num_prefix], dim=1))]
    kept_origins = [origins.gather(1, kept)]
    if fused_origin is not None:
        weights = scores.gather(1, dropped).to(hidden_states.dtype)
        tokens.append(weights[:, None, :] @ _pick_tokens(hidden_states, dropped + num_prefix))
        kept_origins.append(torch.full_like(origins[:, :1], fused_origin))
    return torch.cat(tokens, dim=1), torch.cat(kept_origins, dim=1)


def _pick_tokens(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """[B, N, D] at positions [B, K] -> [B, K, D]; by `index_select`, as `gather` keeps its whole input for backward."""
    images, num_tokens, width = hidden_states.shape
    rows = positions + num_tokens * torch.arange(images, device=positions.device)[:, None]
    return hidden_states.reshape(-1, width).index_select(0, rows.reshape(-1)).view(images, -1, width)
