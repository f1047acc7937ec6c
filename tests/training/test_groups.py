"""Optimizer groups: only what trains, timm's layer decay, no weight decay on norms and biases."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError
from peft_bsr.training import param_groups
from peft_bsr.training.groups import trained_parameters


def rates_by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_blocks_decay_by_their_index_in_the_model(make_model):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks=[1, 3]))
    rates = rates_by_name(model, param_groups(model, learning_rate=1.0, layer_decay=0.5))
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        expected = 0.125 if ".layers.1." in name else 0.5 if ".layers.3." in name else 1.0
        assert rate == pytest.approx(expected), name
    assert set(rates.values()) == {0.125, 0.5, 1.0}


def test_full_fine_tuning_decays_down_to_the_embeddings(make_model):
    model = make_model()
    rates = rates_by_name(model, param_groups(model, learning_rate=1.0, layer_decay=0.5))
    assert len(rates) == len(list(model.parameters()))
    assert {rate for name, rate in rates.items() if ".embeddings." in name} == {0.5**5}
    assert {rate for name, rate in rates.items() if ".layers.0." in name} == {0.5**4}
    assert {rate for name, rate in rates.items() if name.startswith(("classifier", "vit.layernorm"))} == {1.0}


def test_pefts_own_lora_is_grouped_too(make_model):
    model = get_peft_model(make_model(), LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]))
    groups = param_groups(model, learning_rate=1e-3, layer_decay=0.5, head_lr=0.1)
    rates = rates_by_name(model, groups)
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in rates.items() if "classifier" in name} == {0.1}
    assert {rate for name, rate in rates.items() if ".layers.3." in name} == {5e-4}


def test_only_matrices_decay(make_model):
    model = get_peft_model(make_model(), BSRConfig())
    groups = param_groups(model, learning_rate=1e-3, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1]
    assert all(p.ndim == 1 for p in groups[0]["params"])
    assert all(p.ndim == 2 for p in groups[1]["params"])


def test_blocks_that_alast_rests_are_grouped(make_model, images):
    model = get_peft_model(make_model(), ALaSTConfig(trainable_blocks_per_step=1)).train()
    before = set(trained_parameters(model))
    model(images)
    assert sum(p.requires_grad for p in trained_parameters(model).values()) < len(before)
    assert set(trained_parameters(model)) == before


def test_a_plain_trainer_takes_them(make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(8)]
    optimizer = torch.optim.AdamW(param_groups(model, learning_rate=1e-3, layer_decay=0.5))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3, 5e-4, 2.5e-4}


@pytest.mark.parametrize("wrong", [{"layer_decay": 0}, {"layer_decay": 1.5}, {"head_lr": -1}, {"weight_decay": -1}])
def test_numbers_that_cannot_be_are_named(wrong, make_model):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        param_groups(make_model(), learning_rate=1e-3, **wrong)


def test_nothing_to_train_is_said(make_model):
    with pytest.raises(ConfigError, match="no parameter has `requires_grad=True`"):
        param_groups(make_model().requires_grad_(False), learning_rate=1e-3)
