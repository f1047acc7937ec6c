"""Merged tokens are those of the NumPy reference, and each patch finds its token again."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bsr import core, ops
from peft_bsr.core import Route

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
import merging as reference


@settings(max_examples=25, deadline=None)
@given(
    patches=st.integers(2, 17),
    rates=st.lists(st.floats(0.1, 1.0), min_size=1, max_size=3),
    special=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 99),
)
def test_merged_tokens_are_the_references_and_every_patch_finds_its_token(patches, rates, special, seed):
    generator = torch.Generator().manual_seed(seed)
    prefix, suffix = special
    tokens = torch.randn(2, prefix + patches + suffix, 5, generator=generator, dtype=torch.float64)
    route = Route(prefix, patches, suffix)
    expected = [(image[prefix : prefix + patches].numpy(), [[i] for i in range(patches)]) for image in tokens]
    places = [list(range(patches)) for _ in tokens]
    ends = tokens[:, :prefix], tokens[:, prefix + patches :]
    for rate in rates:
        keep = core.num_kept(rate, route.num_tokens - prefix - suffix)
        tokens, *left = ops.merge_tokens(
            tokens, route.origins_like(tokens), route.merged_like(tokens), prefix, keep, suffix
        )
        route = route.reduced(*left)
        for image, (values, groups) in enumerate(expected):
            values, groups, stand = reference.merge(values, groups, keep)
            expected[image] = values, groups
            places[image] = [places[image][place] for place in stand]
    assert tokens.shape[1] == route.num_tokens == prefix + suffix + len(expected[0][0])
    assert torch.equal(tokens[:, :prefix], ends[0]) and torch.equal(tokens[:, tokens.shape[1] - suffix :], ends[1])
    whole = route.unmerge(tokens)
    assert torch.equal(whole[:, :prefix], ends[0]) and torch.equal(whole[:, prefix + patches :], ends[1])
    for image, (values, groups) in enumerate(expected):
        np.testing.assert_allclose(tokens[image, prefix : prefix + len(values)].numpy(), values, atol=1e-12)
        assert route.origins[image].tolist() == places[image], "a token stands where its partner was"
        for value, group in zip(values, groups, strict=True):
            for patch in group:
                np.testing.assert_allclose(whole[image, prefix + patch].numpy(), value, atol=1e-12)


@pytest.mark.parametrize("merge", [core.merge_tokens, ops.merge_tokens], ids=["plain", "operator"])
def test_gradients_flow_through_the_means_alone(merge):
    tokens = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    patches = torch.arange(7).expand(2, -1)
    assert torch.autograd.gradcheck(lambda t: merge(t, patches, patches, 1, 3, 1)[0], tokens)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        merged = merge(tokens, patches, patches, 1, 5, 1)[0]
    assert all(t.numel() <= 2 * 9 for t in saved if t.is_floating_point()), "no token is kept for backward"
    (gradient,) = torch.autograd.grad(merged.sum(), tokens)
    torch.testing.assert_close(gradient.sum(1), torch.full((2, 3), 7.0, dtype=torch.float64))  # weights sum to 1


def test_keeping_all_returns_the_very_inputs():
    tokens, patches = torch.randn(2, 5, 3), torch.arange(4).expand(2, -1)
    found = ops.merge_tokens(tokens, patches, patches, 1, 4)
    assert all(a is b for a, b in zip(found, (tokens, patches, patches), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_tokens_in_half_precision_merge_with_their_like(dtype):
    """Products of such tokens are no numbers in 16 bits; their cosines are."""
    directions = torch.eye(4)[[0, 1, 2, 0, 1, 3, 2, 3]]
    tokens = (directions * torch.linspace(300, 900, 8)[:, None])[None].to(dtype)
    patches = torch.arange(8)[None]
    _, origins, merged = ops.merge_tokens(tokens, patches, patches, 0, 6)
    assert origins.shape == (1, 6)
    assert merged[0, 0] == 3 and merged[0, 4] == 1


def test_tokens_that_are_not_numbers_still_have_places():
    tokens, patches = torch.full((1, 6, 2), torch.nan), torch.arange(6)[None]
    _, origins, merged = ops.merge_tokens(tokens, patches, patches, 0, 3)
    assert origins.shape == (1, 3) and set(merged[0].tolist()) <= set(origins[0].tolist())
