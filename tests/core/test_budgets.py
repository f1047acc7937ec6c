"""ALaST's pure functions against a literal reference."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_bsr.core import block_change, reduced_delta, select_blocks, update_budgets
from peft_bsr.engine import Reduction
from peft_bsr.tuners.alast.config import budgeted
from tests.reference.alast import importance, new_budget, token_counts

EIGHTS = Reduction(0.9, fuse=False, of_all=True, multiple=8)


@pytest.mark.parametrize("reduction", ["relative", "paper", "mean"])
def test_importance(reduction):
    before, after = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    total = block_change(before, after, reduction).item()
    assert reduced_delta(total, 5, reduction) == pytest.approx(importance(before.numpy(), after.numpy(), reduction))


def test_importance_in_half_precision_is_computed_in_full():
    before = torch.full((1, 1024), 300.0, dtype=torch.float16)
    assert block_change(before, -before, "paper").item() == 1024 * 600.0**2  # beyond float16's range


def test_budgets():
    rng = np.random.default_rng(0)
    budgets, old, new = rng.uniform(0.5, 1, 12), rng.normal(size=12), rng.normal(size=12)
    found = update_budgets(budgets.tolist(), new.tolist(), old.tolist(), 0.3, 0.5, 1.0)
    expected = [new_budget(b, n, o, 0.3, 0.5, 1.0) for b, n, o in zip(budgets, new, old, strict=True)]
    assert found == expected
    assert 0.5 in found and 1.0 in found


def test_unclipped_budgets_telescope():
    deltas = np.random.default_rng(0).normal(size=(20, 4))
    budgets = [0.9] * 4
    for old, new in itertools.pairwise(deltas):
        budgets = update_budgets(budgets, new.tolist(), old.tolist(), 0.01, -10, 10)
    assert budgets == pytest.approx((0.9 + 0.01 * (deltas[-1] - deltas[0])).tolist())


def test_token_counts_of_the_paper():
    expected = [197, 178, 161, 145, 131, 118, 107, 97, 88, 80, 73, 66]
    assert token_counts([0.9] * 12, 197) == expected
    found, num_tokens = [], 197
    for _ in range(12):
        found.append(num_tokens)
        num_tokens = Reduction(0.9, fuse=False, of_all=True).count_after(num_tokens, 1)
    assert found == expected


@pytest.mark.parametrize(("rate", "after"), [(1.0, 10), (0.95, 10), (0.9, 10), (0.89, 9), (0.05, 2)])
def test_special_tokens_come_on_top_and_one_patch_stays(rate, after):
    assert Reduction(rate, fuse=False, of_all=True).count_after(10, 1) == after


def test_top_and_prefix():
    generator = random.Random(0)
    budgets = [0.9, 0.5, 1.0, 0.9, 0.9]
    assert select_blocks(budgets, 3, "topk", generator) == [2, 3, 4]
    assert select_blocks(budgets, 2, "prefix", generator) == [3, 4]


def test_draws_follow_the_budgets():
    generator = random.Random(0)
    draws = [select_blocks([3.0, 0.0, 0.0, 0.0], 1, "sample", generator)[0] for _ in range(2000)]
    share = np.exp(3) / (np.exp(3) + 3)
    assert draws.count(0) / 2000 == pytest.approx(share, abs=0.03)
    every = select_blocks([0.9] * 12, 9, "sample", generator)
    assert len(set(every)) == 9 and every == sorted(every)


@pytest.mark.parametrize(
    ("share", "before", "after"), [(0.95, 197, 184), (0.9025, 184, 176), (1.0, 197, 197), (0.01, 16, 2)]
)
def test_lengths_are_the_nearest_multiples_of_what_the_first_block_got(share, before, after):
    reduction = Reduction(0.9, fuse=False, of_all=True, share=share, multiple=8)
    assert reduction.count_after(before, 1, 197) == after


def test_few_lengths_occur_whatever_the_budgets():
    generator, lengths = random.Random(0), set()
    for _ in range(200):
        share, length = 1.0, 197
        for _ in range(12):
            budget = generator.uniform(0.5, 1.0)
            share *= budget
            before, length = length, budgeted(EIGHTS, budget, share).count_after(length, 1, 197)
            assert length <= before and (abs(length - 197 * share) <= 4 or length in (2, before))
            lengths.add(length)
    assert len(lengths) <= 26


def test_a_multiple_of_one_is_the_papers_rule():
    paper = replace(EIGHTS, multiple=1)
    assert budgeted(paper, 0.9, 0.5).count_after(178, 1, 197) == 161
