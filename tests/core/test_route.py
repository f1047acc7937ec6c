"""A route selects the alive tokens' part of whatever tells a block about tokens."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from peft_bsr.core import ForwardContext, Route

# one special token, six patches, one detection token; patches 1 and 4 alive, and one token fused from the others
ROUTE = Route(1, 6, 1, origins=torch.tensor([[1, 4, 6], [0, 5, 6]]), num_reductions=1)


def test_places_count_special_and_fused_tokens():
    assert ROUTE.places().tolist() == [[0, 2, 5, 8, 7], [0, 1, 6, 8, 7]]
    assert (ROUTE.num_tokens, ROUTE.full_length, ROUTE.fused_origin) == (5, 8, 7)


def test_a_bias_loses_rows_and_columns_and_the_fused_token_takes_those_of_the_class_token():
    bias = torch.randn(1, 2, 8, 8)
    followed = ROUTE.gather(bias)
    assert followed.shape == (2, 2, 5, 5)
    for image, tokens in enumerate(([0, 2, 5, 0, 7], [0, 1, 6, 0, 7])):
        assert torch.equal(followed[image], bias[0][:, tokens][:, :, tokens])
    assert torch.equal(ROUTE.gather(bias[0]), followed), "a bias [H, N, N] without images is alike"


@pytest.mark.parametrize("shape", [(2, 8), (2, 1, 1, 8)])
def test_a_padding_mask_loses_columns(shape):
    mask = torch.rand(shape) > 0.5
    expected = mask.view(2, 8).gather(1, torch.tensor([[0, 2, 5, 0, 7], [0, 1, 6, 0, 7]]))
    assert torch.equal(ROUTE.gather(mask).view(2, 5), expected)


def test_a_fused_token_is_visible_without_a_class_token():
    route = Route(0, 4, origins=torch.tensor([[0, 3, 4]]), num_reductions=1)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert route.gather(mask)[0, 0].tolist() == [[False, False, True]] * 2 + [[True] * 3]
    assert route.gather(torch.full((1, 1, 1, 4), -1.0)).tolist() == [[[[-1.0, -1.0, 0.0]]]]


@pytest.mark.parametrize("rows", [6, 8], ids=["of patches", "of all tokens"])
def test_a_pair_of_rotary_tables_loses_rows_and_does_not_rotate_the_fused_token(rows):
    cos, sin = torch.randn(rows, 4), torch.randn(rows, 4)
    found_cos, found_sin = ROUTE.gather((cos, sin))
    tokens = [1, 4] if rows == 6 else [0, 2, 5]
    assert torch.equal(found_cos[0, 0, : len(tokens)], cos[tokens])
    assert torch.equal(found_sin[0, 0, : len(tokens)], sin[tokens])
    fused = len(tokens)
    assert found_cos[:, :, fused].eq(1).all() and found_sin[:, :, fused].eq(0).all()
    assert found_cos.shape == (2, 1, 3 if rows == 6 else 5, 4)


def test_tables_with_axes_of_their_own_keep_them():
    table = torch.randn(2, 3, 6, 4)
    followed = ROUTE.gather(table)
    assert followed.shape == (2, 3, 3, 4)
    assert torch.equal(followed[1, :, :2], table[1][:, [0, 5]])


def test_what_does_not_speak_of_tokens_stays():
    size = torch.tensor([4, 4])
    assert ROUTE.gather(size) is size
    assert ROUTE.gather((32, None, "x")) == (32, None, "x")
    mask = torch.zeros(1, 1, 8, 8)
    assert Route(1, 6, 1).gather(mask) is mask


def test_masks_of_flex_attention_are_refused():
    class BlockMask:
        pass

    with pytest.raises(NotImplementedError, match="cannot follow a mask of flex attention; use sdpa or eager"):
        ROUTE.gather(BlockMask())


def test_a_context_is_one_for_each_thread_and_copies_start_empty():
    context = ForwardContext()
    context.now.route = ROUTE
    seen = []
    thread = threading.Thread(target=lambda: seen.append(context.now.route))
    thread.start()
    thread.join()
    assert seen == [None]
    assert copy.deepcopy(context).now.route is None
    assert pickle.loads(pickle.dumps(context)).now.route is None


def test_what_compiled_code_sets_on_the_context_is_there_in_the_same_thread_alone():
    """torch.compile loses what it sets on a thread-local itself."""
    context, inside, seen = ForwardContext(), [], []

    @torch.compiler.disable
    def look() -> None:
        inside.append(context.now.reading)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        context.now.reading = tokens + 1
        look()
        context.now.reading = context.now.reading + 1
        return tokens * 2

    torch.compile(forward, backend="eager")(torch.ones(1))
    assert [t.item() for t in inside] == [2.0] and context.now.reading.item() == 3.0
    thread = threading.Thread(target=lambda: seen.append(context.now.reading))
    thread.start()
    thread.join()
    assert seen == [None]
