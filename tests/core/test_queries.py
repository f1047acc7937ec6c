"""Absorbed projections are the projections; padding is hidden."""

from __future__ import annotations

import pytest
import torch

from peft_bsr.core import absorb_key, apply_value, attend_plain, hidden_tokens, pooling_weights

B, Q, N, H, D = 2, 3, 5, 4, 16


@pytest.fixture
def parts():
    torch.manual_seed(0)
    tokens = torch.randn(B, N, D)
    key, value = torch.nn.Linear(D, D), torch.nn.Linear(D, D)
    return torch.randn(B, Q, D), tokens, key, value


def absorbed(query, tokens, key, value, hidden=None):
    weights = pooling_weights(absorb_key(query, key.weight, H), tokens, 0.5, hidden)
    return apply_value(weights @ tokens, value.weight, value.bias, H)


@pytest.mark.parametrize("padding", [False, True])
def test_absorbed_equals_plain(parts, padding):
    query, tokens, key, value = parts
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
    expected = attend_plain(query, key(tokens), value(tokens), H, 0.5, hidden)
    torch.testing.assert_close(absorbed(query, tokens, key, value, hidden), expected, atol=1e-5, rtol=0)
    if padding:
        other = tokens.clone()
        other[1, 3:] = 7.0
        torch.testing.assert_close(absorbed(query, other, key, value, hidden), expected, atol=1e-5, rtol=0)


def test_plain_is_torchs_own(parts):
    query, tokens, key, value = parts
    heads = (t.unflatten(2, (H, -1)).transpose(1, 2) for t in (query, key(tokens), value(tokens)))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, scale=0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend_plain(query, key(tokens), value(tokens), H, 0.5), expected, atol=1e-6, rtol=0)


def test_softmax_runs_in_fp32(parts):
    """As in eager attention: the same gradient to the last bit."""
    query, tokens = (t.bfloat16().requires_grad_() for t in parts[:2])
    expected = (torch.bmm(query, tokens.transpose(1, 2)) * 0.5).softmax(-1, dtype=torch.float32).bfloat16()
    factors = torch.randn(B, Q, N).bfloat16()
    gradients = [
        torch.autograd.grad((weights * factors).sum(), [query, tokens])
        for weights in (pooling_weights(query, tokens, 0.5), expected)
    ]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_widths_of_heads_need_not_fill_the_tokens():
    torch.manual_seed(0)
    tokens, query = torch.randn(B, N, D), torch.randn(B, Q, 8)
    key, value = torch.nn.Linear(D, 8), torch.nn.Linear(D, 8, bias=False)
    expected = attend_plain(query, key(tokens), value(tokens), H, 0.5)
    torch.testing.assert_close(absorbed(query, tokens, key, value), expected, atol=1e-5, rtol=0)


def test_masks_hide_padding_and_biases_hide_nothing():
    visible = torch.tensor([[True, True, False], [True, False, False]])
    assert hidden_tokens(None) is None
    assert torch.equal(hidden_tokens(visible), ~visible)
    assert torch.equal(hidden_tokens(visible.long()), ~visible)
    assert torch.equal(hidden_tokens(visible[:, None, None].expand(-1, 1, 3, 3)), ~visible)
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min)
    assert torch.equal(hidden_tokens(additive), ~visible)
    assert not hidden_tokens(torch.randn(1, H, 3, 3)).any()
