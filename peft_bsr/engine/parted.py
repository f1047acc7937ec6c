"""The attention half when some tokens carry gradients and the others run without a graph.

All tokens attend to all tokens in the order of the sequence, so the forward does not change; for backward, keys and
values of the others are constants. Shapes: B images, N tokens, C chosen, O others, H heads, d head width, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_bsr.backbones import attend, first_rows
from peft_bsr.core import BlockCall, TokenSplit
from peft_bsr.engine.halves import Admit, LeanAttention, known_arguments
from peft_bsr.engine.plan import Lean
from peft_bsr.ops import recomputed, token_scores


class PartedAttention(LeanAttention):
    """A lean attention half that can also run in two parts; see `LeanAttention`."""

    def parted(
        self, call: BlockCall, split: TokenSplit, tokens: Tensor, arguments: dict[str, object], lean: Lean | None
    ) -> tuple[Tensor, Tensor]:
        """The tokens after the half: those that carry gradients [B, C or Q, D], and the others [B, O, D].

        Args:
            call: The block's call. Scores, if asked for, are stored in it.
            split: Which tokens carry gradients.
            tokens: [B, N, D].
            arguments: Arguments of the attention other than the tokens.
            lean: What is not kept for backward; None = plain operations.
        """
        mask, tables = known_arguments(arguments)
        count = None if lean is None else lean.num_queries
        op, rate = self.op_for(count), self.rate
        is_recomputed = lean is not None and not lean.save_products
        project = op.plain if lean is None or is_recomputed else op
        mix = partial(self._mix_parts, call.score, tables, rate, call.admit, is_recomputed, split, project)
        inputs = (mask, *self.norm_tensors(), *self.tensors())
        chosen, others = split.part(tokens)
        if is_recomputed:
            results = recomputed(mix, chosen, others, *inputs, is_random=rate > 0)
        else:
            results = mix(chosen, others, *inputs)
        mixed, query, key, value, *scores = results
        if scores:
            call.token_scores = scores[0]
        after = chosen[:, :count] + self.finished(mixed)
        if count is not None:
            return after, others
        with torch.no_grad():
            mixed = attend(self.attention, self.source, query, key, value, split.rows_of(mask)[1], self.scaling, rate)
            return after, others + self.finished(mixed)

    def scores(self, kind: str, tokens: Tensor, arguments: dict[str, object]) -> Tensor:
        """Scores of the tokens [B, N], without a graph, before the half runs."""
        mask, tables = known_arguments(arguments)
        with torch.no_grad():
            inputs = (*self.norm_tensors(), *self.tensors())
            query, key, _ = self._heads(self.op_for(None).plain, True, tokens, *inputs)
            if tables is not None:
                query, key = self._rotated(query, key, tables)
            return token_scores(kind, query, key, self.scaling, mask)

    def _mix_parts(
        self,
        score: str | None,
        tables: Sequence[Tensor] | None,
        rate: float,
        admit: Admit | None,
        is_recomputed: bool,
        split: TokenSplit,
        project: Callable[[Tensor, Sequence[Tensor | None]], tuple[Tensor, Tensor, Tensor]],
        chosen: Tensor,
        others: Tensor,
        mask: Tensor | None,
        *inputs: Any,
    ) -> tuple[Tensor, ...]:
        """Attention output of the chosen [B, C or Q, H * d]; query of the others, key and value of all; scores.

        Only the first has a graph. Arguments are those of `LeanAttention._mix`, the two parts of the tokens, and
        `project`, which computes query, key and value of the chosen.
        """
        query, key, value = self._heads(project, is_recomputed, chosen, *inputs)
        with torch.no_grad():
            other_query, other_key, other_value = self._heads(self.op_for(None).plain, True, others, *inputs)
        key, value = _join(split, key, other_key), _join(split, value, other_value)
        asks_all = query.shape[2] == split.chosen.shape[1]
        needs_all = asks_all and (tables is not None or score not in (None, "class"))
        ranked = _join(split, query, other_query) if needs_all else query
        if tables is not None:
            ranked, key = self._rotated(ranked, key, tables)
        query = ranked
        if needs_all:
            query, other_query = (part.transpose(1, 2) for part in split.part(ranked.transpose(1, 2)))
        rows = split.rows_of(mask)[0] if asks_all else first_rows(mask, query.shape[2])
        mixed = self._attended(query, key, value, rows, rate, admit)
        found = mixed, other_query.detach(), key.detach(), value.detach()
        return found if score is None else (*found, token_scores(score, ranked, key, self.scaling, mask))

    def _heads(
        self,
        project: Callable[[Tensor, Sequence[Tensor | None]], tuple[Tensor, Tensor, Tensor]],
        is_recomputed: bool,
        tokens: Tensor,
        *inputs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by heads, after their norms."""
        query_weight, query_bias, key_weight, key_bias, *tensors = inputs
        query, key, value = project(tokens, tensors)
        query = self._normed(self.norms[0], query, query_weight, query_bias, is_recomputed)
        return query, self._normed(self.norms[1], key, key_weight, key_bias, is_recomputed), value


def _join(split: TokenSplit, chosen: Tensor, others: Tensor) -> Tensor:
    """[B, H, C, d] and [B, H, O, d] -> [B, H, N, d], with the memory layout of [B, N, H, d]."""
    return split.join(chosen.transpose(1, 2), others.transpose(1, 2)).transpose(1, 2)


__all__ = ["PartedAttention"]
