"""A block read by queries is the block; what is kept for backward, and in which form."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_bsr import UnsupportedModelError, probe_model
from peft_bsr.backbones import probe, probe_inputs
from peft_bsr.cost import saved_activations
from peft_bsr.engine import QueryPath
from peft_bsr.engine.query_path import pool_tokens
from peft_bsr.selftest import verify_queries

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from families import SUPPORTED

REFUSED = {"internvl_qk_norm": "differs from the block", "blip": r"no module for \['query', 'key', 'value'\]"}
REFUSED |= {"vjepa2": "its own positions"}
REFUSED |= dict.fromkeys(("wav2vec2", "hubert", "data2vec_audio"), "are not norm, attention, norm and MLP")
PARTS = {"clip_dual", "siglip_dual", "llava", "paligemma", "smolvlm", "internvl_chat"}  # SynQT is not for parts
READ = sorted(set(SUPPORTED) - set(REFUSED) - PARTS)


def tokens_and_queries(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 17, 32, dtype=dtype), torch.randn(2, 8, 32, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("family", READ)
def test_every_plain_block_can_be_read(family):
    model = SUPPORTED[family]()
    spec, stock = probe(model)
    path = verify_queries(model, spec, spec.depth - 1, QueryPath(spec), stock)
    assert path.absorbs


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_with_the_reason(family):
    model = SUPPORTED[family]()
    spec = probe_model(model)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        verify_queries(model, spec, 0, QueryPath(spec), None)


def test_a_block_that_is_no_plain_one_is_refused(make_model):
    model = make_model()
    spec = probe_model(model)
    block = model.vit.layers[1]
    stock_forward = type(block.attention).forward

    class Louder(type(block.attention)):
        def forward(self, hidden_states, *args, **kwargs):
            output, weights = stock_forward(self, hidden_states, *args, **kwargs)
            return 1.01 * output, weights

    block.attention.__class__ = Louder
    with pytest.raises(UnsupportedModelError, match=r"the result differs from the block's output by \d+ times"):
        verify_queries(model, spec, 1, QueryPath(spec), None)


def test_projections_that_are_no_plain_modules_are_not_absorbed(make_model, caplog):
    class Wrapped(nn.Linear):
        pass

    model = make_model()
    spec, stock = probe(model)
    for layer in model.vit.layers:
        layer.attention.k_proj.__class__ = Wrapped
    with caplog.at_level(logging.INFO, logger="peft_bsr"):
        path = verify_queries(model, spec, 0, QueryPath(spec, kept="int8"), stock)
    assert (path.absorbs, path.kept) == (False, "int8")
    assert "keys and values are computed and saved for backward, the projections are not plain Linear" in caplog.text


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip", "videomae", "beit"])
def test_absorbed_equals_plain_outputs_and_gradients(family):
    model = SUPPORTED[family]()
    spec, stock = probe(model)
    block = model.get_submodule(spec.blocks[1])
    hidden_states = stock.calls[1][0][0]
    found = []
    for absorbs in (True, False):
        path = QueryPath(spec, absorbs)
        queries = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = path.read(block, queries, path.tokens_of(block, hidden_states))
        (outputs[0].sin().sum() + outputs[1].cos().sum()).backward()
        found.append((*outputs, queries.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_query_alone_and_are_autograds():
    tokens, query = tokens_and_queries(torch.float64)
    hidden = torch.zeros(2, 17, dtype=torch.bool)
    hidden[0, 12:] = True
    assert torch.autograd.gradcheck(lambda q: pool_tokens(q, tokens, 0.3, hidden), query)
    tokens.requires_grad_()
    pool_tokens(query, tokens, 0.3).sum().backward()
    assert query.grad is not None and tokens.grad is None


def test_second_derivatives_are_refused():
    tokens, query = tokens_and_queries()
    (gradient,) = torch.autograd.grad(pool_tokens(query, tokens, 0.3).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("kept", "share", "error"), [("bfloat16", 0.5, 1e-2), ("float16", 0.5, 2e-3), ("int8", 0.35, 3e-2)]
)
def test_what_is_kept_is_rounded_the_output_is_not(kept, share, error):
    tokens, query = tokens_and_queries()
    exact = pool_tokens(query, tokens, 0.3)
    rounded = pool_tokens(query, tokens, 0.3, kept=kept)
    assert torch.equal(exact, rounded)
    expected, found = (torch.autograd.grad(t.sin().sum(), query)[0] for t in (exact, rounded))
    assert 0 < float((found - expected).norm() / expected.norm()) < error
    whole, small = (
        saved_activations(nn.Identity(), lambda k=k: pool_tokens(query, tokens, 0.3, kept=k)) for k in ("full", kept)
    )
    weights = 2 * 8 * 17 * 4
    assert small - weights <= share * (whole - weights) and whole == weights + tokens.nbytes


def test_tokens_from_a_cache_stay_in_their_dtype():
    tokens, query = tokens_and_queries()
    cached = tokens.bfloat16()
    saved = saved_activations(nn.Identity(), lambda: pool_tokens(query, cached, 0.3))
    assert saved == 2 * 8 * 17 * 4 + cached.nbytes


def test_padding_is_not_read():
    model = SUPPORTED["siglip2"]()
    spec = probe_model(model)
    inputs = probe_inputs(model, 1, spec.image_shape)
    assert not inputs["pixel_attention_mask"].all()
    verify_queries(model, spec, 0, QueryPath(spec), None)
