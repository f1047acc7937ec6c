"""Attaching, loading and probing do not depend on what the caller has switched off: gradients, inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import peft_bsr
from peft_bsr import ALaSTConfig, BSRConfig, HubError, MoEConfig, SynQTConfig, UnsupportedModelError, probe_model
from peft_bsr.cost import estimate

pytestmark = pytest.mark.sampled(2)

CONFIGS: dict[str, Callable[[], Any]] = {
    "bsr": BSRConfig,
    "lora": lambda: BSRConfig(trainable="lora", lean="max"),
    "int8": lambda: BSRConfig(saved_activations="int8"),
    "tasks": lambda: BSRConfig(tasks={"a": 3, "b": 2}, moe=MoEConfig(num_experts=4, top_k=1)),
    "alast": ALaSTConfig,
    "alast_paper": lambda: ALaSTConfig(preset="paper", alpha=0.1),
    "synqt": SynQTConfig,
    "synqt_reduced": lambda: SynQTConfig(keep_rate=0.5),
}
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}


@pytest.fixture(params=CONFIGS)
def method(request) -> str:
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def train_step(model, method, images) -> dict[str, torch.Tensor]:
    named = {"task": "a"} if method == "tasks" else {}
    torch.manual_seed(0)
    model.train()(pixel_values=images, labels=torch.tensor([0, 2]), **named).loss.backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_attached_there_it_trains_outside(make_vit, method, mode, images):
    expected = train_step(get_peft_model(make_vit(), CONFIGS[method]()), method, images)
    base = make_vit()
    with mode():
        model = get_peft_model(base, CONFIGS[method]()).eval()
        model(pixel_values=images, **({"task": "a"} if method == "tasks" else {}))
    found = train_step(model, method, images)
    assert list(found) == list(expected) and len(found) > 3
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_there_it_is_the_same(make_vit, method, mode, is_trainable, images, tmp_path):
    named = {"task": "a"} if method == "tasks" else {}
    make_vit().save_pretrained(tmp_path / "base")
    saved = get_peft_model(type(make_vit()).from_pretrained(tmp_path / "base"), CONFIGS[method]()).eval()
    saved.save_pretrained(tmp_path / "adapter")
    base = make_vit()
    with mode():
        models = [PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=is_trainable).eval()]
        models.append(peft_bsr.load(tmp_path / "adapter", is_trainable=is_trainable).eval())
        for model in models:
            assert torch.equal(model(pixel_values=images, **named).logits, saved(pixel_values=images, **named).logits)
    for model in models if is_trainable else ():
        assert len(train_step(model, method, images)) > 3


def test_probed_and_estimated_there(make_vit, mode):
    expected = probe_model(make_vit()), estimate(make_vit(), BSRConfig())
    base = make_vit()
    with mode():
        assert (probe_model(base), estimate(base, BSRConfig())) == expected
        peft_bsr.verify_trainability(get_peft_model(base, BSRConfig()))


def test_a_task_added_there_trains_outside(make_vit, mode, images):
    model = get_peft_model(make_vit(), CONFIGS["tasks"]())
    with mode():
        peft_bsr.add_task(model, "c", 4)
    model.train()(pixel_values=images, labels=torch.tensor([0, 3]), task="c").loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("gates"))


def test_weights_that_were_made_there_are_refused_with_the_reason(make_vit, method):
    with torch.inference_mode():
        base = make_vit()
    for mode in (torch.no_grad, torch.inference_mode):
        with (
            mode(),
            pytest.raises(UnsupportedModelError, match=r"created inside `torch\.inference_mode\(\)`.*Load the"),
        ):
            get_peft_model(base, CONFIGS[method]())


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
    "half default dtype": lambda: default_dtype(torch.bfloat16),
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
    "deterministic": deterministic,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("config", ["lora", "tasks", "synqt"])
def test_the_callers_state_is_not_the_models(make_vit, config, state, images, tmp_path):
    """The probe runs the model as it is, and new weights are the same, whatever holds around the call."""
    make_vit().save_pretrained(tmp_path / "base")
    first, base, other = (type(make_vit()).from_pretrained(tmp_path / "base") for _ in range(3))
    torch.manual_seed(3)
    expected = get_peft_model(first, CONFIGS[config]())
    expected.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(3)
    with STATES[state]():
        model = get_peft_model(base, CONFIGS[config]())
        assert probe_model(other) == expected.base_model.spec
        loaded = [PeftModel.from_pretrained(other, tmp_path / "adapter", is_trainable=True)]
        if state == "default device":  # meta: transformers says why
            with pytest.raises(HubError, match="meta device context"):
                peft_bsr.load(tmp_path / "adapter")
        else:
            loaded.append(peft_bsr.load(tmp_path / "adapter", is_trainable=True))
    named = {"task": "a"} if config == "tasks" else {}
    spec, logits = expected.base_model.spec, expected.eval()(pixel_values=images, **named).logits
    for found in (model, *loaded):
        assert torch.equal(found.eval()(pixel_values=images, **named).logits, logits)
        assert spec == found.base_model.spec == expected.base_model.spec
        assert found.base_model.plan() == expected.base_model.plan()
        kinds = [[(n, p.dtype, p.device, p.requires_grad) for n, p in m.named_parameters()] for m in (found, expected)]
        assert kinds[0] == kinds[1]
