"""The reduction with a backward of its own against the plain one, and against finite differences."""

from __future__ import annotations

import pytest
import torch

from peft_bsr import core, ops

ORIGINS = torch.arange(5).expand(2, -1)


def tokens_and_scores(suffix: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6 + suffix, 3, dtype=torch.float64, generator=generator)
    scores = torch.rand(2, 6 + suffix, dtype=torch.float64, generator=generator)
    scores[1, 2] = scores[1, 3]  # a tie
    return hidden.requires_grad_(), scores.requires_grad_()


@pytest.mark.parametrize("suffix", [0, 2])
@pytest.mark.parametrize("fused_origin", [None, 5])
def test_values_and_gradients_are_those_of_the_plain_reduction(fused_origin, suffix):
    results = []
    for reduce in (core.reduce_tokens, ops.reduce_tokens):
        hidden, scores = tokens_and_scores(suffix)
        found, origins = reduce(hidden, ORIGINS, scores, 1, 2, fused_origin, suffix)
        (found * torch.arange(found.numel()).view_as(found)).sum().backward()
        results.append((found, origins, hidden.grad, torch.zeros_like(scores) if scores.grad is None else scores.grad))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_of_the_fused_token_by_finite_differences():
    hidden, scores = tokens_and_scores()
    scores = (scores.detach() + torch.arange(6) * 2).requires_grad_()  # no order changes by a small step
    assert torch.autograd.gradcheck(lambda h, s: ops.reduce_tokens(h, ORIGINS, s, 1, 2, 5)[0], (hidden, scores))


def test_gradients_of_class_scores_by_finite_differences():
    query, key = (torch.randn(2, 3, 5, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: ops.token_scores("class", q, k, 0.5), (query, key))
    torch.testing.assert_close(ops.token_scores("class", query, key, 0.5), core.token_scores("class", query, key, 0.5))
