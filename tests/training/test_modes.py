"""Every method trains in every mode of torch as it does without: compiled as a whole, autocast, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, MoEConfig, SynQTConfig

pytestmark = pytest.mark.sampled(2)

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bsr": lambda: BSRConfig(trainable_blocks=[1, 2], reduction_blocks=[1], keep_rate=0.5),
    "lora": lambda: BSRConfig(trainable="lora", trainable_blocks=[1, 2], lean="max"),
    "tasks": lambda: BSRConfig(trainable_blocks=[2], tasks={"a": 3, "b": 2}, moe=MoEConfig(num_experts=4, top_k=1)),
    "alast": lambda: ALaSTConfig(trainable_blocks_per_step=2),
    "alast_sample": lambda: ALaSTConfig(trainable_blocks_per_step=2, selection="sample"),
    "synqt": lambda: SynQTConfig(keep_rate=0.5, dropout=0.0, drop_path=0.0),
}
# where dynamo takes up to two minutes
SLOW = [pytest.param(name, marks=() if name in ("bsr", "alast", "synqt") else pytest.mark.slow) for name in CONFIGS]


def make(method: str) -> PeftModel:
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **SIZES))
    return get_peft_model(base, CONFIGS[method]()).train()


def train(method: str, compiled: bool = False, autocast: bool = False, reentrant: bool | None = None) -> list[float]:
    model = make(method)
    if reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.compiler.reset()
    run = torch.compile(model, backend="eager") if compiled else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    named = {"task": "a"} if method == "tasks" else {}
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses = []
    # ALaST: more than the graphs that dynamo makes of one function before it leaves it to Python
    steps = 10 if method.startswith("alast") else 4
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(pixel_values=images, labels=torch.tensor([0, 1, 2, 0]), **named).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if method.startswith("alast"):
        assert model.base_model.schedule().step == steps
    return losses


@cache
def expected(method: str) -> list[float]:
    """Losses without any mode."""
    losses = train(method)
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", SLOW)
def test_compiled_as_a_whole(method):
    assert train(method, compiled=True) == pytest.approx(expected(method), rel=1e-4)


@pytest.mark.parametrize("method", CONFIGS)
def test_autocast(method):
    assert train(method, autocast=True) == pytest.approx(expected(method), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_autocast_and_compiled(method):
    assert train(method, compiled=True, autocast=True) == pytest.approx(expected(method), rel=0.03)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", CONFIGS)
def test_checkpointing(method, reentrant):
    assert train(method, reentrant=reentrant) == pytest.approx(expected(method), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m == "bsr" else pytest.mark.slow) for m in CONFIGS])
def test_checkpointing_and_compiled(method, reentrant):
    assert train(method, compiled=True, reentrant=reentrant) == pytest.approx(expected(method), rel=1e-4)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name == "bsr" else pytest.mark.slow) for name in CONFIGS]
)
def test_evaluation_compiled_as_a_whole(method):
    """Once trained, in one graph; ALaST, too, which no compiler traces in training."""
    model = make(method).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    named = {"task": "a"} if method == "tasks" else {}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=method != "tasks")
    with torch.no_grad():
        found, wanted = (run(pixel_values=images, **named).logits for run in (compiled, model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
