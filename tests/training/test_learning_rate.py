"""The sweep: finds a rate that trains, is bounded, and leaves no trace; the table of defaults is the benchmark's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError
from peft_bsr.training import (
    LEARNING_RATES,
    ALaSTCallback,
    TrainingLoss,
    default_learning_rate,
    find_learning_rate,
    param_groups,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "method_comparison" / "results" / "cpu" / "recipes.json"


def data(count=60):
    """Three classes, each bright in one colour."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    for i, image in enumerate(images):
        image[i % 3] += 1
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def trainer_of(model, folder, rate, **settings):
    arguments = TrainingArguments(
        str(folder), learning_rate=rate, per_device_train_batch_size=6, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no", label_names=["labels"], max_steps=4, **settings,
    )  # fmt: skip
    callbacks = [ALaSTCallback()] if hasattr(model.base_model, "schedule") else []
    return Trainer(
        model, arguments, train_dataset=data(), compute_loss_func=TrainingLoss(label_smoothing=0.1), callbacks=callbacks
    )


CONFIGS = {
    "bsr": BSRConfig(trainable_blocks="last:2"),
    "alast": ALaSTConfig(),
    "alast by the rate": ALaSTConfig(alpha="lr"),
    "lora": LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]),
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIGS[name], id=name, marks=pytest.mark.slow if name in ("alast", "lora") else ())
        for name in CONFIGS
    ],
)
def test_nothing_is_left(config, make_model, tmp_path):
    """Training after a sweep is bit for bit training without one."""

    def run(is_swept):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        model = get_peft_model(make_model(hidden_dropout_prob=0.1), config)
        trainer = trainer_of(model, tmp_path, 1e-3)
        states = random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        modes, asking = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        if is_swept:
            find_learning_rate(trainer, steps=2)
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
            assert (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
            assert [m.training for m in model.modules()] == modes
            assert [p.requires_grad for p in model.parameters()] == asking
            assert all(p.grad is None for p in model.parameters())
            assert trainer.args.learning_rate == 1e-3
        trainer.train()
        return model.state_dict()

    plain, swept = run(False), run(True)
    assert all(torch.equal(plain[name], swept[name]) for name in plain)


def test_it_goes_outwards_to_where_training_works(make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    found = find_learning_rate(trainer_of(model, tmp_path, 1e-5), steps=4)
    assert found.learning_rate == pytest.approx(1e-4)
    assert len(found.losses) == 4, "the smallest is not worth trying"
    assert min(found.losses, key=found.losses.get) == found.learning_rate
    assert list(found.losses) == sorted(found.losses)
    assert (found.steps, found.train_images, found.held_out_images) == (4, 24, 12)
    assert "learning rate 1.0e-04, by the loss of 12 training images after 4 steps on 24 others" in str(found)


def test_rates_that_diverge_are_not_taken(make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    trainer = trainer_of(model, tmp_path, 1e30, max_grad_norm=0.0)
    with pytest.raises(ConfigError, match="gives a finite loss"):
        find_learning_rate(trainer, steps=2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_groups_of_ones_own_are_swept(make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    rates = []

    def make_optimizer(rate):
        rates.append(rate)
        return torch.optim.AdamW(param_groups(model, learning_rate=rate, layer_decay=0.5))

    find_learning_rate(trainer_of(model, tmp_path, 1e-3), steps=1, make_optimizer=make_optimizer)
    assert 3 <= len(rates) <= 4


def test_few_images_are_refused(make_model, tmp_path):
    trainer = trainer_of(get_peft_model(make_model(), BSRConfig()), tmp_path, 1e-3)
    trainer.train_dataset = data(9)
    with pytest.raises(ConfigError, match="10 training images"):
        find_learning_rate(trainer)


RECIPES = {
    "bsr_spread": ("bsr", "full"),
    "bsr_last3": ("bsr", "full"),
    "bsr_spread_lora": ("bsr", "lora"),
    "bsr_last3_lora": ("bsr", "lora"),
    "alast": ("alast", "full"),
    "synqt": ("synqt", None),
    "losa": ("losa", None),
    "lora_all": ("lora", None),
    "lora_qv": ("lora", None),
    "full": ("full", None),
    "linear_probe": ("linear", None),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_defaults_are_what_the_benchmark_found(recipe):
    found = json.loads(RESULTS.read_text())[recipe]["learning_rate"]
    method, trainable = RECIPES[recipe]
    assert default_learning_rate(method, {"trainable": trainable} if trainable else {}) == found
    assert LEARNING_RATES[RECIPES[recipe]] == found


def test_a_preset_determines_the_default():
    for preset in ("balanced", "lora"):
        assert default_learning_rate("bsr", {"preset": preset}) == default_learning_rate("bsr", {"trainable": "lora"})
    assert default_learning_rate("bsr", {"preset": "balanced", "trainable": "full"}) == default_learning_rate("bsr")
