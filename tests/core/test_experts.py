"""Routing of tokens to experts."""

from __future__ import annotations

import pytest
import torch

from peft_bsr.core import balance_loss, choose_experts, gate_logits, run_experts
from peft_bsr.cost import count_flops


@pytest.fixture
def logits():
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_softmax_runs_over_all_experts_before_the_choice(logits):
    choice = choose_experts(logits, 2, renormalize=False)
    expected, experts = logits.softmax(-1).sort(descending=True)
    assert torch.equal(choice.experts, experts[:, :2])
    torch.testing.assert_close(choice.weights, expected[:, :2])
    assert choice.weights.sum(1).max() < 1


def test_renormalised_weights_sum_to_one(logits):
    choice = choose_experts(logits, 3)
    torch.testing.assert_close(choice.weights.sum(1), torch.ones(40))


def test_half_precision_logits_are_weighed_in_fp32(logits):
    assert choose_experts(logits.bfloat16(), 2).weights.dtype == torch.float32


def test_equal_experts_are_one_mlp(logits):
    tokens = torch.randn(40, 5)
    output = run_experts(tokens, choose_experts(logits, 4), lambda _, part: torch.tanh(part))
    torch.testing.assert_close(output, torch.tanh(tokens), atol=1e-6, rtol=1e-6)


def test_unused_experts_do_not_run_and_used_ones_run_once(logits):
    logits = logits.clone()
    logits[:, [1, 4]] = -1e9
    ran = []
    run_experts(torch.randn(40, 5), choose_experts(logits, 2), lambda e, part: ran.append(e) or part)
    assert ran == [0, 2, 3, 5]


def test_cost_follows_top_k(logits):
    weight, tokens = torch.randn(6, 5, 5), torch.randn(40, 5)
    for k in (1, 2, 6):
        choice = choose_experts(logits, k)
        assert count_flops(lambda c=choice: run_experts(tokens, c, lambda e, t: t @ weight[e])) == 2 * 40 * k * 25


def test_a_mixed_batch_is_gated_like_its_tasks_alone():
    tokens, gates = torch.randn(3, 4, 5), torch.randn(2, 6, 5)
    mixed = gate_logits(tokens, gates, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(mixed[[0, 2]], gate_logits(tokens[[0, 2]], gates, 1))
    torch.testing.assert_close(mixed[[1]], gate_logits(tokens[[1]], gates, 0))


def test_balance_loss_is_zero_for_even_use_and_pushes_towards_it():
    even = torch.eye(4).repeat(5, 1) * 3
    assert balance_loss(choose_experts(even, 1)).item() == pytest.approx(0, abs=1e-6)
    uneven = torch.zeros(20, 4)
    uneven[:, 0] = 1
    uneven.requires_grad_()
    loss = balance_loss(choose_experts(uneven, 1, renormalize=False))
    assert loss > 3.9  # one of four does it all: CV^2 is 4, of importance and of load
    loss.backward()
    choice = choose_experts(torch.tensor([[2.0, 1.0, 0.0]]), 2, renormalize=False)
    importance, load = torch.tensor([*choice.weights[0], 0.0]), torch.tensor([1.0, 1.0, 0.0])
    expected = sum(v.var() / v.mean() ** 2 for v in (importance, load))
    torch.testing.assert_close(balance_loss(choice), expected)
