"""ALaST compiled: halves of blocks as functions, for any length, with the gradients and memory of eager mode."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from peft import get_peft_model
from transformers import BeitConfig, BeitForImageClassification, ViTConfig, ViTForImageClassification

import peft_bsr
from peft_bsr import AdapterError, ALaSTConfig, LeanBlockWarning
from tests.engine.test_compiled_lean import assert_same, kept_bytes

SIZES = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 80, "patch_size": 8}
PARTITIONED = "aot_eager_decomp_partition"  # eager kernels, and the partitioner that inductor uses
NEEDS_GCC = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
MOST_GRAPHS = 5  # two for frozen blocks, one more attention and MLP for the first trained, one more for later ones


@pytest.fixture(autouse=True)
def clean_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make(depth=4, **settings):
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_hidden_layers=depth, num_labels=5))
    return get_peft_model(model, ALaSTConfig(**{"initial_budget": 0.9, "token_multiple": 4} | settings)).train()


def batch(seed=0, images=4):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(images, 3, 80, 80, generator=generator) + 0.2 * seed,
        "labels": torch.arange(images) % 5,
    }


def steps(model, count, looks=False, autocast=False, **settings):
    """Bytes kept (if `looks`), loss and gradients of each step; and the token counts that occurred."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    found, lengths = [], set()
    for seed in range(count):
        inputs = batch(seed, **settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        kept = kept_bytes(loss, model) if looks else 0
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((kept, loss.detach(), gradients))
        lengths |= {count for count, _ in model.base_model.schedule().plan.token_counts(101, 1)}
        optimizer.step()
        optimizer.zero_grad()
    return found, lengths


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("depth", "count", "backend"),
    [
        (3, 4, "eager"),
        pytest.param(12, 20, PARTITIONED, marks=pytest.mark.slow),
        pytest.param(12, 20, "inductor", marks=[pytest.mark.slow, NEEDS_GCC]),
    ],
)
def test_steps_of_other_lengths_are_those_of_eager_mode(depth, count, backend):
    looks = backend != "eager"  # eager runs the regions themselves, and what they keep can be read only once
    expected, lengths = steps(make(depth), count, looks)
    model = peft_bsr.compile(make(depth), backend=backend)
    found, met = steps(model, count, looks)
    assert met == lengths and len(met) >= 4
    for own, of_eager in zip(found, expected, strict=True):
        assert_same(own, of_eager)
        assert own[0] <= 1.02 * of_eager[0]
    assert graphs() <= MOST_GRAPHS
    with torch.compiler.set_stance("fail_on_recompile"):
        steps(model, 1, images=3)  # nor for another batch


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "most", "allowed"),
    [
        ({"lean": "max"}, 5, 1.05),
        ({"lean": "off"}, 5, 1.02),
        ({"trainable": "lora", "r": 2}, 5, 1.06),
        ({"selection": "sample", "trainable_blocks_per_step": 2}, 8, 1.02),
        ({"preset": "paper", "alpha": 0.5}, 8, 1.02),
    ],
    ids=str,
)
def test_other_settings(settings, most, allowed):
    expected, _ = steps(make(6, **settings), 5, looks=True)
    found, _ = steps(peft_bsr.compile(make(6, **settings), backend=PARTITIONED), 5, looks=True)
    for own, of_eager in zip(found, expected, strict=True):
        assert_same(own, of_eager)
        assert own[0] <= allowed * of_eager[0]
    assert graphs() <= most


@pytest.mark.slow
def test_under_autocast_and_with_gradient_checkpointing():
    for is_checkpointed in (False, True):
        found = []
        for is_compiled in (False, True):
            model = make() if is_checkpointed else make(initial_budget=1.0, alpha=0.0)  # else rounding picks tokens
            if is_checkpointed:
                model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            if is_compiled:
                peft_bsr.compile(model, backend=PARTITIONED)
            found.append(steps(model, 2, autocast=not is_checkpointed)[0])
        for of_eager, own in zip(*found, strict=True):
            assert_same(own, of_eager, 1e-5 if is_checkpointed else 2e-2)


@pytest.mark.slow
def test_what_steps_aside():
    """A half with a hook is not compiled, and activations are kept in full, not in 8 bits."""
    model, sums = make(saved_activations="int8"), []
    expected = steps(make(), 2)[0]
    peft_bsr.compile(model, backend=PARTITIONED)
    mlp = model.get_base_model().vit.layers[3].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: sums.append(float(output.sum())))
    with pytest.warns(
        LeanBlockWarning, match="keeps activations in full, not in 8 bits as planned: its halves are compiled"
    ):
        assert_same(steps(model, 1)[0][0], expected[0], 1e-2)  # block 3 is not compiled, and packs
    assert len(sums) == 1
    handle.remove()
    before, _, last = model.base_model.explain().partition("\n    3  ")
    assert "activations are kept in full: its halves are compiled" in before and "kept in full" not in last


@pytest.mark.slow
def test_copies_and_pickles_are_compiled_too():
    model = peft_bsr.compile(make(), inputs=batch(), backend=PARTITIONED)
    before = graphs()
    assert 0 < before <= MOST_GRAPHS and model.base_model.schedule().step == 0
    expected = steps(copy.deepcopy(model), 2)[0][1]
    assert_same(steps(pickle.loads(pickle.dumps(model)), 2)[0][1], expected)
    assert graphs() == before


def test_what_is_refused():
    with pytest.raises(AdapterError, match="records CUDA graphs, each for one sequence length"):
        peft_bsr.compile(make(), mode="reduce-overhead")
    config = BeitConfig(**SIZES, num_hidden_layers=2, use_relative_position_bias=True)
    model = get_peft_model(BeitForImageClassification(config), ALaSTConfig())
    with pytest.raises(AdapterError, match=r"block 0 cannot be compiled half by half.*position biases of all tokens"):
        peft_bsr.compile(model)
