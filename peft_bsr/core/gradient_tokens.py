"""Splits tokens into those with gradients and the others. Shapes: B images, N tokens, C chosen, O others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peft_bsr.core.reduction import num_kept, select_tokens


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """A split of a sequence into tokens with and without gradients.

    Attributes:
        chosen: Indices of the tokens that carry gradients, [B, C] int64, ascending.
        others: Indices of the other tokens, [B, O] int64, ascending.
    """

    chosen: Tensor
    others: Tensor

    @classmethod
    def of(cls, scores: Tensor, share: float, num_prefix: int, num_suffix: int = 0) -> TokenSplit | None:
        """Choose the special tokens and the `ceil(share * M)` other tokens with the highest scores.

        Args:
            scores: Token scores, [B, P + M + S]. Ties go to the lower index.
            share: Share of the non-special tokens, in (0, 1].
            num_prefix: Number of special tokens at the front, P.
            num_suffix: Number of special tokens at the end, S. Default 0.

        Returns:
            The split, or None if all tokens are chosen.
        """
        end = scores.shape[1] - num_suffix
        num_chosen = num_kept(share, end - num_prefix)
        if num_chosen == end - num_prefix:
            return None
        best, rest = select_tokens(scores[:, num_prefix:end], num_chosen)
        places = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[0], -1)
        chosen = torch.cat([places[:, :num_prefix], best + num_prefix, places[:, end:]], dim=1)
        return cls(chosen, rest + num_prefix)

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """Indices in the flattened batch, [B * C] and [B * O]."""
        batch, length = self.chosen.shape[0], self.chosen.shape[1] + self.others.shape[1]
        starts = torch.arange(0, batch * length, length, device=self.chosen.device)[:, None]
        return (self.chosen + starts).flatten(), (self.others + starts).flatten()

    def part(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, ...] -> chosen tokens [B, C, ...], and the others [B, O, ...], detached."""
        flat, batch = tokens.flatten(0, 1), tokens.shape[0]
        chosen, others = (
            part.index_select(0, rows).unflatten(0, (batch, -1))
            for part, rows in zip((flat, flat.detach()), self._rows, strict=True)
        )
        return chosen, others

    def join(self, chosen: Tensor, others: Tensor) -> Tensor:
        """The inverse of `part`. Only the chosen tokens get gradients."""
        of_chosen, of_others = self._rows
        batch, *sizes = others.shape[0], *others.shape[2:]
        whole = others.new_empty(len(of_chosen) + len(of_others), *sizes)
        whole.index_copy_(0, of_others, others.detach().flatten(0, 1))
        # not `index_copy_`, which keeps its source for backward
        return whole.index_put_((of_chosen,), chosen.flatten(0, 1)).unflatten(0, (batch, -1))

    def rows_of(self, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The rows of a mask or bias [.., N or 1, N] for the queries of each part."""
        if mask is None or mask.ndim < 3 or mask.shape[-2] == 1:
            return mask, mask
        whole = mask[None] if mask.ndim == 3 else mask
        whole = whole.expand(self.chosen.shape[0], -1, -1, -1)
        shape = (-1, whole.shape[1], -1, whole.shape[3])
        of_chosen, of_others = (
            whole.gather(2, places[:, None, :, None].expand(*shape)) for places in (self.chosen, self.others)
        )
        return of_chosen, of_others


__all__ = ["TokenSplit"]
