"""Side inputs follow a route as a literal loop does it, whatever their axes and however long these happen to be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bsr.core import Route

FOLDER = str(Path(__file__).parents[1] / "reference")
sys.path.insert(0, FOLDER)

import side_inputs as reference  # noqa: E402

sys.path.remove(FOLDER)


@st.composite
def routes(draw):
    prefix, patches, suffix = draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(st.integers(0, 2))
    alive, fused = draw(st.integers(1, patches)), draw(st.integers(0, 2))
    images = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kept = [sorted(rng.permutation(patches)[:alive]) + [patches + j for j in range(fused)] for _ in range(images)]
    return Route(prefix, patches, suffix, origins=torch.tensor(np.array(kept)), num_reductions=fused), rng


def alive_of(route: Route) -> list[list[int | None]]:
    numbers = route.num_prefix, route.num_patches, route.num_suffix
    return [reference.alive_tokens(origins.numpy(), *numbers) for origins in route.origins]


@settings(max_examples=60, deadline=None)
@given(routes(), st.sampled_from(["bool", "float", "int"]), st.booleans(), st.sampled_from(["2", "3", "1", "B"]))
def test_masks_and_biases(case, dtype, has_rows, axes):
    """[B, N], [H, N, N], and [1 or B, H, N or 1, N]."""
    route, rng = case
    images, length, heads = route.origins.shape[0], route.full_length, 2
    rows = length if has_rows else 1
    shape = {"2": (images, length), "3": (heads, length, length), "1": (1, heads, rows, length)}
    shape["B"] = (images, heads, rows, length)
    values = rng.standard_normal(shape[axes])
    mask = {"bool": values > 0, "float": values, "int": (values > 0).astype(np.int64)}[dtype]
    found = route.gather(torch.from_numpy(mask), "mask").numpy()
    assert found.dtype == mask.dtype
    whole = {"2": mask[:, None, None], "3": mask[None]}.get(axes, mask)
    found = found[:, None, None] if axes == "2" else found
    visible = 0.0 if dtype == "float" else 1
    for image, tokens in enumerate(alive_of(route)):
        for head in range(whole.shape[1]):
            one = whole[image if len(whole) > 1 else 0, head]
            assert np.array_equal(found[image, head], reference.gather_mask(one, tokens, route.num_prefix, visible))


@settings(max_examples=60, deadline=None)
@given(routes(), st.booleans(), st.sampled_from(["2", "3", "B", "4"]), st.sampled_from(["one", "rows", "three"]))
def test_tables(case, of_patches, axes, width):
    """[rows, d], [1 or B, rows, d] and [B, H, rows, d]; `d` may be as long as there are rows."""
    route, rng = case
    images, rows = route.origins.shape[0], route.num_patches if of_patches else route.full_length
    width = {"one": 1, "rows": rows, "three": 3}[width]
    leading = {"2": (), "3": (1,), "B": (images,), "4": (images, 2)}[axes]
    cos, sin = (torch.from_numpy(rng.standard_normal((*leading, rows, width))) for _ in range(2))
    pair = route.gather((cos, sin), "rotary_tables")
    assert torch.equal(pair[1], route.gather(sin, "table"))
    first = route.num_prefix if of_patches else 0
    for table, found, fused in ((cos, pair[0], 1.0), (sin, pair[1], 0.0)):
        for image, tokens in enumerate(alive_of(route)):
            if of_patches:
                tokens = tokens[route.num_prefix : len(tokens) - route.num_suffix]
            own = table if axes == "2" else table[image if len(table) > 1 else 0]
            for head, one in enumerate(own if axes == "4" else [own]):
                place = found[image] if axes in ("3", "B") else found[image, head]
                assert np.array_equal(place.numpy(), reference.gather_table(one.numpy(), tokens, first, fused))


def test_a_shape_alone_leaves_it_open():
    """As many columns as rows: each reading is named, and what is told decides."""
    route = Route(1, 4, 0, origins=torch.tensor([[0, 3]]))
    table = torch.randn(1, 5, 5)
    assert route.readings(table) == ("mask", "table", "other")
    assert route.readings((table, table)) == ("rotary_tables", "items")
    assert route.readings(torch.randn(1, 5, 4)) == ("table", "other") and route.readings(None) == ("other",)
    assert torch.equal(route.gather(table, "table"), table[:, [0, 1, 4]])
    assert torch.equal(route.gather(table, "mask")[0, 0], table[0][[0, 1, 4]][:, [0, 1, 4]])
    assert route.gather(table, "other") is table


@pytest.mark.parametrize("kind", ["mask", "table", "rotary_tables", "other"])
def test_what_is_not_there_stays_away(kind):
    """The probe saw one, this forward has none; and a mask of one column for all tokens stays as it is."""
    route = Route(1, 4, 0, origins=torch.tensor([[0, 3]]))
    assert route.gather(None, kind) is None
    mask = torch.zeros(1, 1, 5, 1)
    assert route.gather(mask, "mask") is mask
