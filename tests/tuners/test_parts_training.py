"""A part of a larger model trains in every way that a model by itself does, or is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, Trainer, TrainingArguments

import peft_bsr
from peft_bsr import ALaSTConfig, BSRConfig, LoSAConfig, SynQTConfig, UnsupportedModelError
from peft_bsr.errors import FeatureCacheError, ReductionNotMergedWarning
from peft_bsr.training import FeatureCache
from tests.tuners.test_parts import TEXT, VIT, make_clip, make_llava

Gradients = tuple[float, dict[str, Tensor]]


def make_smolvlm() -> SmolVLMForConditionalGeneration:
    torch.manual_seed(0)
    text = {"model_type": "llama", **TEXT}
    config = SmolVLMConfig(vision_config=VIT, text_config=text, image_token_id=59)
    return SmolVLMForConditionalGeneration(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"clip": make_clip, "llava": make_llava, "smolvlm": make_smolvlm}


def batch_of(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 59, (2, 24), generator=generator)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    if name == "clip":
        return {"input_ids": words, "pixel_values": images, "return_loss": True}
    words[:, : 16 if name == "llava" else 4] = 59
    return {"input_ids": words, "pixel_values": images if name == "llava" else images[:, None], "labels": words}


def attach(name: str, config: PeftConfig | None = None, **settings: Any) -> PeftModel:
    torch.manual_seed(3)
    settings = {"trainable_blocks": [1, 2], "init_weights": False, **settings}
    return get_peft_model(MODELS[name](), config or BSRConfig(**settings)).train()


def gradients(model: nn.Module, name: str, context: AbstractContextManager[Any] | None = None) -> Gradients:
    torch.manual_seed(5)
    model.zero_grad()
    with context or nullcontext():
        loss = model(**batch_of(name)).loss
    loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in trained.values()), "some of it does not train"
    return loss.item(), trained


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-5) -> None:
    """Losses and gradients, at the scale of the largest."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("settings", [{}, {"trainable": "lora", "keep_rate": 1.0}], ids=["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_of_the_whole_and_autocast(name, settings):
    stock = gradients(attach(name, lean="off", **settings), name)
    assert_same(gradients(attach(name, **settings), name), stock)
    for use_reentrant in (False, True):
        model = attach(name, **settings)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_same(gradients(model, name), stock)
    under, stock_under = (
        gradients(attach(name, lean=lean, **settings), name, torch.autocast("cpu", torch.bfloat16))
        for lean in ("exact", "off")
    )
    assert_same(under, stock_under, tolerance=0.05)  # as in tests/contract/test_autocast.py


@pytest.mark.parametrize("name", MODELS)
def test_in_8_bits(name):
    """Rounded weights give the gradients of stock blocks with the same weights; activations only change gradients."""
    rounded = {"frozen_weights": "int8"}
    assert_same(gradients(attach(name, **rounded), name), gradients(attach(name, **rounded, lean="off"), name))
    stock, packed = gradients(attach(name, lean="off"), name), gradients(attach(name, saved_activations="int8"), name)
    assert_same(packed, stock, tolerance=0.02)
    with pytest.raises(AssertionError):
        assert_same(packed, stock)


@pytest.mark.parametrize("name", ["clip", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llava", "smolvlm"))])
def test_compiled_to_one_graph(name):
    torch.compiler.reset()
    stock, model = gradients(attach(name, lean="off"), name), attach(name)
    peft_bsr.compile(model, backend="aot_eager")
    assert_same(gradients(model, name), stock)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("clip", ALaSTConfig(trainable_blocks_per_step=2)),
        ("smolvlm", ALaSTConfig(trainable_blocks_per_step=2)),
        ("llava", LoSAConfig()),
    ],
)
def test_the_trainer_checkpoints_the_whole(name, config, tmp_path):
    batch = batch_of(name)
    rows = [{key: v[i] if isinstance(v, Tensor) else v for key, v in batch.items()} for i in (0, 1)]
    found = []
    for checkpointing in (False, True):
        model = attach(name, config)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            adam_epsilon=1e-3,
            logging_steps=1,
            gradient_checkpointing=checkpointing,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=lambda _: batch)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][0][0] != found[0][0][1]
    assert_same((0.0, found[1][1]), (0.0, found[0][1]))


@pytest.mark.parametrize("name", MODELS)
def test_merged(name):
    for settings in ({"keep_rate": 1.0}, {"keep_rate": 1.0, "trainable": "lora"}):
        model = attach(name, **settings).eval()
        with torch.no_grad():
            expected = model(**batch_of(name)).loss
            merged = model.merge_and_unload().eval()
            torch.testing.assert_close(merged(**batch_of(name)).loss, expected, rtol=1e-5, atol=1e-6)
        assert type(merged) is type(MODELS[name]())
    with pytest.warns(ReductionNotMergedWarning):
        attach(name).merge_and_unload()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_refused_leaves_all_as_it_was(name, tmp_path: Path):
    model = attach(name)
    before = {n: (id(module), module.training) for n, module in model.named_modules()}
    with pytest.raises(FeatureCacheError, match="Train without a cache"):
        FeatureCache.build(model, [batch_of(name)], tmp_path / "cache")
    assert {n: (id(module), module.training) for n, module in model.named_modules()} == before
    assert not list(tmp_path.iterdir())
    base = MODELS[name]()
    before = {n: (id(module), module.training) for n, module in base.named_modules()}
    with pytest.raises(UnsupportedModelError, match=r"the head of SynQT .*has no classifier.*BSR, ALaST or LoSA"):
        get_peft_model(base, SynQTConfig())
    assert {n: (id(module), module.training) for n, module in base.named_modules()} == before
    assert all(p.requires_grad for p in base.parameters()) and "peft_config" not in vars(base)
