"""Routing of tokens to experts."""

from __future__ import annotations

from unittest import mock

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


def literal(tokens, choice, weight, bias):
    """Every expert on every token, those that were not chosen weighted by 0."""
    weights = torch.zeros_like(choice.probabilities).scatter(1, choice.experts, choice.weights)
    outputs = torch.einsum("nd,efd->nef", tokens, weight)
    outputs = outputs if bias is None else outputs + bias
    return (torch.tanh(outputs) * weights.to(outputs.dtype)[:, :, None]).sum(dim=1)


@pytest.fixture
def by_block(monkeypatch):
    """The layout of devices that are not the CPU, here."""
    monkeypatch.setattr("peft_bsr.core.experts.is_traced", lambda: True)


@pytest.mark.parametrize("device", ["by size", "by block"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("favourite", [None, 0, 4])
@pytest.mark.parametrize(("num_experts", "k", "n"), [(6, 1, 400), (6, 2, 401), (6, 6, 40), (5, 3, 7), (2, 1, 1)])
def test_both_layouts_give_the_literal_sum_and_its_gradients(request, device, with_bias, favourite, num_experts, k, n):
    if device == "by block":
        request.getfixturevalue("by_block")
    torch.manual_seed(0)
    logits = torch.randn(n, num_experts, dtype=torch.float64)
    if favourite is not None:  # one expert has all of the tokens
        logits[:, favourite % num_experts] += 100
    logits.requires_grad_()
    tokens = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(num_experts, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(num_experts, 4, dtype=torch.float64, requires_grad=True) if with_bias else None
    choice = choose_experts(logits, k)
    found = run_experts(tokens, choice, lambda part, product: torch.tanh(product(part, weight, bias)))
    expected = literal(tokens, choice, weight, bias)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    sources = [t for t in (tokens, logits, weight, bias) if t is not None]
    goal = torch.randn_like(found)
    gradients = [torch.autograd.grad((o * goal).sum(), sources, retain_graph=True) for o in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_blocks_under_autocast_have_its_dtype_and_gradients_that_of_the_weights(by_block, logits):
    tokens, weight = torch.randn(40, 8, requires_grad=True), torch.randn(6, 8, 8, requires_grad=True)
    bias = torch.randn(6, 8, requires_grad=True)
    choice, seen = choose_experts(logits, 2), []
    with torch.autocast("cpu", torch.bfloat16):
        run = run_experts(tokens, choice, lambda part, product: seen.append(product(part, weight, bias)) or seen[0])
    run.sum().backward()
    assert seen[0].dtype == torch.bfloat16
    assert {t.grad.dtype for t in (tokens, weight, bias)} == {torch.float32}


def test_blocks_keep_inputs_and_no_copies_of_weights(by_block):
    logits, weight = torch.randn(64, 6), torch.randn(6, 32, 32, requires_grad=True)
    choice, tokens, kept = choose_experts(logits, 1), torch.randn(64, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run_experts(tokens, choice, lambda part, product: product(part, weight, None))
    assert any(t is weight for t in kept)
    assert all(t is weight or t.shape[-2:] != weight.shape[-2:] for t in kept)


def test_second_derivatives(by_block):
    logits, tokens = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    choice = choose_experts(logits, 1)
    inputs = (tokens, weight)
    assert torch.autograd.gradgradcheck(
        lambda t, w: run_experts(t, choice, lambda part, product: torch.tanh(product(part, w, None))), inputs
    )


@pytest.mark.parametrize(("device", "most"), [("by size", 1.0), ("by block", 1.3)])
def test_cost_follows_top_k(request, device, most):
    if device == "by block":
        request.getfixturevalue("by_block")
    weight, tokens = torch.randn(6, 5, 5), torch.randn(4000, 5)
    for k in (1, 2, 5, 6):
        choice = choose_experts(torch.randn(4000, 6), k)
        flops = count_flops(lambda c=choice: run_experts(tokens, c, lambda part, p: p(part, weight, None)))
        assert k <= flops / (2 * 4000 * 25) <= min(most * k, 6)


def test_an_unused_expert_does_not_run_on_the_cpu(logits):
    logits = logits.clone()
    logits[:, [1, 4]] = -1e9
    weight, products = torch.randn(6, 5, 5), []
    choice = choose_experts(logits, 2)
    with mock.patch("peft_bsr.core.grouped.linear", lambda *a: products.append(a) or torch.nn.functional.linear(*a)):
        run_experts(torch.randn(40, 5), choice, lambda part, product: product(part, weight, None))
    assert len(products) == 4


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
