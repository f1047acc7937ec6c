from __future__ import annotations

import pytest
import torch

from peft_bsr.core import num_kept, pick_tokens, put_tokens, reduce_tokens, select_tokens, token_scores
from peft_bsr.engine import LivingBytes


@pytest.mark.parametrize(
    ("keep_rate", "tokens", "kept"),
    [(0.5, 196, 98), (0.5, 99, 50), (0.5, 51, 26), (0.7, 10, 7), (0.55, 100, 55), (0.01, 5, 1), (1.0, 7, 7)],
)
def test_num_kept_is_the_exact_ceiling(keep_rate, tokens, kept):
    assert num_kept(keep_rate, tokens) == kept


def test_select_tokens_splits_by_score_and_keeps_the_order_of_positions():
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.4, 0.3]])
    kept, dropped = select_tokens(scores, 3)
    assert kept.tolist() == [[1, 3, 4]]
    assert dropped.tolist() == [[0, 2]]


def test_ties_go_to_the_lower_position():
    assert select_tokens(torch.ones(1, 6), 2)[0].tolist() == [[0, 1]]


def test_the_selection_is_that_of_a_stable_sort_with_and_without_ties():
    generator = torch.Generator().manual_seed(0)
    for keep in (1, 5, 19, 20):
        for scores in (
            torch.rand(50, 20, generator=generator),
            torch.randint(3, (50, 20), generator=generator).float(),
            torch.zeros(2, 20),
        ):
            ranking = scores.argsort(dim=1, descending=True, stable=True)
            kept, dropped = select_tokens(scores, keep)
            assert torch.equal(kept, ranking[:, :keep].sort(dim=1).values)
            assert torch.equal(dropped, ranking[:, keep:].sort(dim=1).values)


def test_scores_that_are_not_numbers_still_give_places():
    """A diverged run must end in its own loss being NaN, not in an index out of range on the accelerator."""
    kept, dropped = select_tokens(torch.full((2, 6), torch.nan), 2)
    assert kept.shape == (2, 2) and dropped.shape == (2, 4)
    assert torch.cat([kept, dropped], dim=1).max() < 6


def test_reduce_tokens_keeps_prefix_kept_and_fused_in_this_order():
    hidden = torch.arange(12.0).view(1, 6, 2)
    origins = torch.arange(4)[None]
    scores = torch.tensor([[9.0, 9.0, 0.1, 0.4, 0.2, 0.3]])
    tokens, left = reduce_tokens(hidden, origins, scores, num_prefix=2, keep=2, fused_origin=4)
    assert left.tolist() == [[1, 3, 4]]
    fused = 0.1 * hidden[0, 2] + 0.2 * hidden[0, 4]
    torch.testing.assert_close(tokens[0], torch.stack([*hidden[0, :2], hidden[0, 3], hidden[0, 5], fused]))


def test_the_suffix_stays_at_the_end():
    hidden = torch.arange(14.0).view(1, 7, 2)
    scores = torch.tensor([[9.0, 0.1, 0.4, 0.2, 0.3, 9.0, 9.0]])
    tokens, left = reduce_tokens(hidden, torch.arange(4)[None], scores, 1, 2, fused_origin=4, num_suffix=2)
    assert left.tolist() == [[1, 3, 4]]
    fused = 0.1 * hidden[0, 1] + 0.2 * hidden[0, 3]
    torch.testing.assert_close(tokens[0], torch.stack([*hidden[0, [0, 2, 4]], fused, *hidden[0, -2:]]))


def test_picked_tokens_are_put_back_into_a_copy():
    hidden, positions = torch.randn(2, 5, 3), torch.tensor([[0, 3], [4, 1]])
    before, picked = hidden.clone(), pick_tokens(hidden, positions)
    assert torch.equal(picked[1], hidden[1, [4, 1]])
    put = put_tokens(hidden, positions, -picked)
    assert torch.equal(hidden, before)
    assert torch.equal(pick_tokens(put, positions), -picked)
    assert torch.equal(put[0, [1, 2, 4]], hidden[0, [1, 2, 4]])


def test_scores_of_patches_alone_are_refused():
    with pytest.raises(ValueError, match=r"scores \(2, 4\), tokens \(2, 5, 3\) and origins \(2, 4\) do not match"):
        reduce_tokens(torch.randn(2, 5, 3), torch.arange(4).expand(2, -1), torch.rand(2, 4), 1, 2, None)


def test_keeping_all_returns_the_very_inputs():
    hidden, origins = torch.randn(2, 5, 3), torch.arange(4).expand(2, -1)
    tokens, left = reduce_tokens(hidden, origins, torch.rand(2, 5), 1, 4, fused_origin=4)
    assert tokens is hidden
    assert left is origins


def test_gradients_reach_values_and_weights_of_the_fused_token():
    hidden = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    origins = torch.arange(5).expand(2, -1)
    assert torch.autograd.gradcheck(lambda h, s: reduce_tokens(h, origins, s, 1, 2, 5)[0], (hidden, scores))


def test_dropping_without_fusing_saves_no_token_for_backward():
    hidden = torch.randn(2, 50, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        reduce_tokens(hidden, torch.arange(49).expand(2, -1), torch.rand(2, 50), 1, 25, None)
    assert all(not tensor.is_floating_point() for tensor in saved)


@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_scores_are_rows_of_the_full_softmax(mask):
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    logits = query @ key.transpose(-1, -2) * 0.5
    attention_mask = None
    if mask == "bool":
        attention_mask = torch.rand(2, 1, 7, 7) > 0.3
        attention_mask[..., 0] = True
        logits = logits.masked_fill(~attention_mask, -torch.inf)
    elif mask == "float":
        attention_mask = torch.randn(2, 1, 7, 7)
        logits = logits + attention_mask
    weights = logits.softmax(-1)
    torch.testing.assert_close(token_scores("class", query, key, 0.5, attention_mask), weights[:, :, 0].mean(1))
    if mask != "bool":
        received = token_scores("received", query, key, 0.5, attention_mask)
        torch.testing.assert_close(received, weights.mean(dim=(1, 2)))
    if mask is None:
        mean_query = token_scores("mean_query", query, key, 0.5)
        torch.testing.assert_close(mean_query, logits.mean(2).softmax(-1).mean(1))


@pytest.mark.parametrize("kind", ["class", "mean_query"])
def test_scores_by_one_query_keep_no_copy_of_the_keys(kind):
    """Heads are views of the projections; a product with them transposed would keep them anew."""
    query, key = (torch.randn(2, 50, 48, requires_grad=True).view(2, 50, 3, 16).transpose(1, 2) for _ in range(2))
    with LivingBytes() as living:
        scores = token_scores(kind, query, key, 0.25)
    assert living.bytes(exclude=[scores]) < 0.5 * 4 * key.numel()


@pytest.mark.parametrize("kind", ["class", "received"])
def test_softmax_of_scores_runs_in_fp32(kind):
    """As in eager attention: the same gradient to the last bit."""
    query, key = (torch.randn(2, 3, 7, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    rows = query[:, :, :1] if kind == "class" else query
    # the logits as they are made: one query's by a product and a sum
    products = (rows * key).sum(-1)[:, :, None] if kind == "class" else rows @ key.transpose(2, 3)
    expected = (products * 0.5).softmax(-1, dtype=torch.float32).bfloat16().mean(2).mean(1)
    weights = torch.randn(2, 7, dtype=torch.bfloat16)
    found = token_scores(kind, query, key, 0.5)
    gradients = [torch.autograd.grad((scores * weights).sum(), [query, key]) for scores in (found, expected)]
    assert torch.equal(found, expected)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["mean_query", "received"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_neither_scores_nor_votes(kind, dtype):
    """Scores of three tokens and two of padding are the three tokens' own."""
    query, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    visible = torch.tensor([True, True, True, False, False]).expand(2, 1, 5, 5)
    mask = visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, -3e38)
    scores = token_scores(kind, query, key, 0.5, mask)
    torch.testing.assert_close(scores[:, :3], token_scores(kind, query[:, :, :3], key[:, :, :3], 0.5))
    assert (scores[:, 3:] == 0).all()
