"""Token reduction by class attention (BSR, arXiv 2405.10951, section on token dropping).

Shapes: B images, N tokens of which the first P are the prefix (class, distillation, registers) and the last S a suffix
(detection tokens), M = N - P - S others (patches and earlier fused tokens), K of them kept, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_bsr.errors import ForwardError


def is_traced() -> bool:
    """Whether torch.compile, torch.export or a TorchScript trace is running, which need plain operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def num_kept(keep_rate: float, num_tokens: int) -> int:
    """Number of tokens kept: `ceil(keep_rate * num_tokens)`, in exact decimals (0.55 of 100 is 55, not 56).

    Args:
        keep_rate: Share of the tokens to keep, in (0, 1].
        num_tokens: Number of non-special tokens, M.
    """
    return math.ceil(round(keep_rate * int(num_tokens), 6))


def select_tokens(scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of the `keep` highest scores and of the others, each ascending.

    Args:
        scores: [B, M]. Ties go to the lower index.
        keep: Number of tokens to keep, K, a Python integer from 1 to M.

    Returns:
        Indices of the kept tokens [B, K] and of the dropped tokens [B, M - K], int64.
    """
    scores, num_tokens = scores.detach(), scores.shape[1]
    # only the K-th value is used: `topk` does not define the order of ties, and ONNX has no stable sort
    last = scores.topk(keep, dim=1).values[:, -1:]
    is_above, is_tie = scores > last, scores == last
    is_kept = is_above | (is_tie & (is_tie.long().cumsum(dim=1) <= keep - is_above.sum(dim=1, keepdim=True)))
    places = torch.arange(num_tokens, device=scores.device)
    ordered = torch.where(is_kept, places, places + num_tokens).sort(dim=1).values % num_tokens
    return ordered[:, :keep], ordered[:, keep:]


def reduce_tokens(
    hidden_states: Tensor,
    origins: Tensor,
    scores: Tensor,
    num_prefix: int,
    keep: int,
    fused_origin: int | None,
    num_suffix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Keep the special tokens and the `keep` best other ones; optionally append one token fused from the dropped ones.

    The fused token is the sum of the dropped tokens weighted by their scores, not normalized, appended after the kept
    ones. Gradients flow through its values and weights, not through the choice of indices.

    Args:
        hidden_states: [B, P + M + S, D].
        origins: `Route.origins`, [B, M], ascending.
        scores: Token scores, [B, P + M + S], see `token_scores`.
        num_prefix: Number of special tokens at the front, P.
        keep: Number of tokens to keep, K. With K = M nothing is dropped and the inputs are returned unchanged.
        fused_origin: Origin of the fused token, or None to drop without fusing.
        num_suffix: Number of special tokens at the end, S. Default 0.

    Returns:
        Hidden states [B, P + K (+ 1) + S, D] and origins [B, K (+ 1)].

    Raises:
        ForwardError: If the shapes do not match.
    """
    check_tokens(hidden_states, origins, scores, hidden_states.shape[1] - num_prefix - num_suffix)
    if keep == origins.shape[1]:
        return hidden_states, origins
    competing = scores[:, num_prefix : num_prefix + origins.shape[1]]
    kept, dropped = select_tokens(competing, keep)
    prefix = torch.arange(num_prefix, device=kept.device).expand(kept.shape[0], -1)
    tokens = [pick_tokens(hidden_states, torch.cat([prefix, kept + num_prefix], dim=1))]
    kept_origins = [origins.gather(1, kept)]
    if fused_origin is not None:
        weights = competing.gather(1, dropped).to(hidden_states.dtype)
        tokens.append(weights[:, None, :] @ pick_tokens(hidden_states, dropped + num_prefix))
        kept_origins.append(torch.full_like(origins[:, :1], fused_origin))
    if num_suffix:
        tokens.append(hidden_states[:, -num_suffix:])
    return torch.cat(tokens, dim=1), torch.cat(kept_origins, dim=1)


def check_tokens(hidden_states: Tensor, origins: Tensor | None, scores: Tensor, num_competing: int) -> None:
    """Check that the shapes of tokens [B, N, D], scores [B, N] and origins [B, M] match.

    Raises:
        ForwardError: If they do not.
    """
    if scores.shape[1] != hidden_states.shape[1] or (origins is not None and origins.shape[1] != num_competing):
        raise ForwardError(
            f"scores {tuple(scores.shape)}, tokens {tuple(hidden_states.shape)} and origins "
            f"{None if origins is None else tuple(origins.shape)} do not match for "
            f"{hidden_states.shape[1] - num_competing} special tokens"
        )


def pick_tokens(hidden_states: Tensor, positions: Tensor) -> Tensor:
    """[B, N, D] at positions [B, K] -> [B, K, D]. Not by `gather`, which keeps its whole input for backward."""
    images, num_tokens, width = hidden_states.shape
    rows = positions + num_tokens * torch.arange(images, device=positions.device)[:, None]
    return hidden_states.reshape(-1, width).index_select(0, rows.reshape(-1)).view(images, -1, width)


def put_tokens(hidden_states: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """A copy of [B, N, D] with `tokens` [B, K, D] at positions [B, K]."""
    return hidden_states.scatter(1, positions[..., None].expand(-1, -1, hidden_states.shape[2]), tokens)
