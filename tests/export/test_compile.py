"""torch.compile of the whole model and of each block: no graph break, and eager's outputs and gradients."""

from __future__ import annotations

import shutil

import pytest
import torch

SLOW = pytest.mark.slow
FAMILIES = [
    "vit",
    "dinov3",
    "dinov3_compact",
    "beit",
    "siglip",
    *(
        pytest.param(name, marks=SLOW)
        for name in ("dinov2", "data2vec", "clip_bare", "vjepa2", "mlcd", "siglip_pooling")
    ),
]
TRAINED_FAMILIES = [
    "vit",
    "dinov3_compact",
    *(
        pytest.param(name, marks=SLOW)
        for name in ("dinov2", "dinov3", "beit", "siglip", "data2vec", "clip_bare", "vjepa2", "mlcd", "siglip_pooling")
    ),
]
BLOCK_FAMILIES = [  # a ViT's blocks, with what they keep: tests/engine/test_compiled_lean.py
    *(
        pytest.param(name, marks=SLOW)
        for name in ("vit", "dinov2", "dinov3", "dinov3_compact", "beit", "data2vec", "siglip")
    ),
]


@pytest.fixture(autouse=True)
def clean_dynamo():
    """Models share their blocks' code, and with it the limit on its compilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_step(model, call, images) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients of what trains; BEiT and Data2Vec drop paths at random, hence the seed."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    loss = call(images).square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same_step(found, expected, atol=1e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=atol, rtol=0)
    assert found[1].keys() == expected[1].keys()
    assert sum(gradient is not None for gradient in expected[1].values()) >= 2
    for name, gradient in expected[1].items():
        if gradient is None:  # a bare CLIP's final norm sees the class token alone, on another output
            assert found[1][name] is None, name
        else:
            torch.testing.assert_close(found[1][name], gradient, atol=atol, rtol=0, msg=name)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_model_compiles_as_one_graph(make_wrapped, family):
    model, batches = make_wrapped(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(batches[0])
    torch.testing.assert_close(found, model(batches[0]), atol=1e-6, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_serves_every_batch_size(make_wrapped):
    model, batches = make_wrapped("vit")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.mark_dynamic(batches[0], 0)
    compiled(batches[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = compiled(batches[1])
    torch.testing.assert_close(found, model(batches[1]), atol=1e-6, rtol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", TRAINED_FAMILIES)
def test_a_compiled_training_step(make_wrapped, family):
    model, batches = make_wrapped(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = train_step(model, compiled, batches[0])
    assert_same_step(found, train_step(model, model, batches[0]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(make_wrapped):
    model, batches = make_wrapped("vit")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found = compiled(batches[0])
        torch.testing.assert_close(found, model(batches[0]), atol=1e-5, rtol=0)
    step = train_step(model, compiled, batches[0])
    assert_same_step(step, train_step(model, model, batches[0]))


def compile_blocks(model, **settings) -> None:
    base = model.model.get_base_model()
    for name in model.model.base_model.spec.blocks:
        base.get_submodule(name).compile(backend="aot_eager", **settings)


def uncompile_blocks(model) -> None:
    base = model.model.get_base_model()
    for name in model.model.base_model.spec.blocks:
        base.get_submodule(name)._compiled_call_impl = None


@pytest.mark.parametrize("family", BLOCK_FAMILIES)
def test_every_block_compiles_by_itself(make_wrapped, family):
    model, batches = make_wrapped(family)
    compile_blocks(model, fullgraph=True)  # before anything ran eagerly: guards must hold on a fresh model too
    with torch._dynamo.config.patch(recompile_limit=64):  # blocks share their code, but have plans of their own
        found = [train_step(model, model, images) for images in batches]
    uncompile_blocks(model)
    for images, step in zip(batches, found, strict=True):
        assert_same_step(step, train_step(model, model, images))


@pytest.mark.slow
@torch.no_grad()
def test_more_blocks_than_the_compilations_that_torch_allows(make_wrapped):
    model, batches = make_wrapped("dinov2", num_hidden_layers=12)
    compile_blocks(model)
    found = [model(images) for images in batches]
    uncompile_blocks(model)
    for images, output in zip(batches, found, strict=True):
        torch.testing.assert_close(output, model(images), atol=1e-6, rtol=0)
