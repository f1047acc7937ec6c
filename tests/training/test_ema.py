"""The average of the trained weights: its numbers, what Trainer evaluates and saves, and resuming."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_bsr import AdapterFileError, ALaSTConfig, BSRConfig, ConfigError
from peft_bsr.training import ALaSTCallback, TrainedEMA
from peft_bsr.training.ema import FILE
from peft_bsr.training.groups import trained_parameters


def data(count=16):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3} for i in range(count)]


def trainer_of(model, folder, *callbacks, **settings):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "seed": 0,
        "disable_tqdm": True, "dataloader_pin_memory": False, "save_steps": 3, "eval_steps": 3, "logging_steps": 1,
        "eval_strategy": "steps", "label_names": ["labels"], "lr_scheduler_type": "constant", **settings,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **settings)
    return Trainer(model, arguments, train_dataset=data(), eval_dataset=data(8), callbacks=list(callbacks))


def weights(model):
    return {name: p.detach().clone() for name, p in trained_parameters(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_is_the_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    values, expected = [1.0, 3.0, -2.0], None
    with torch.no_grad():
        model.weight.fill_(values[0])
        ema = TrainedEMA(model, decay=0.25)
        expected = values[0]
        for step, value in enumerate(values[1:], 1):
            model.weight.fill_(value)
            ema.update()
            decay = min(0.25, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == -2.0


def test_only_what_trains_is_kept(make_model):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:1"))
    ema = TrainedEMA(model)
    assert set(ema.state_dict()["averages"]) == {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    with ema.applied():
        assert all(torch.equal(p, frozen[n] + 1) for n, p in model.named_parameters() if n in frozen)


def test_states_are_taken_up_and_others_refused(make_model):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:1"))
    ema, other = TrainedEMA(model), TrainedEMA(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    ema.update()
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    assert same(other.state_dict()["averages"], ema.state_dict()["averages"])
    with pytest.raises(AdapterFileError, match="are on one side only"):
        TrainedEMA(torch.nn.Linear(1, 1)).load_state_dict(ema.state_dict())
    with pytest.raises(ConfigError, match="decay=1"):
        TrainedEMA(model, decay=1)
    with pytest.raises(ConfigError, match="has no trainable parameters"):
        TrainedEMA(make_model().requires_grad_(False))


class Recorder(TrainerCallback):
    """The trained weights after each step as the optimizer has them, before any other callback."""

    def __init__(self):
        self.after_step, self.evaluated = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.after_step.append(weights(kwargs["model"]))

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(weights(kwargs["model"]))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(BSRConfig(trainable_blocks="last:2"), id="bsr"),
        pytest.param(ALaSTConfig(), id="alast", marks=pytest.mark.slow),
    ],
)
def test_trainer_steps_the_weights_and_shows_the_average(config, make_model, tmp_path):
    extra = [ALaSTCallback()] if isinstance(config, ALaSTConfig) else []
    plain_model = get_peft_model(make_model(), config)
    plain = Recorder()
    trainer_of(plain_model, tmp_path / "plain", *extra, plain).train()

    model = get_peft_model(make_model(), config)
    start, seen = weights(model), Recorder()
    trainer = trainer_of(model, tmp_path / "ema", *extra, seen, TrainedEMA(model))
    trainer.train()
    assert all(same(a, b) for a, b in zip(plain.after_step, seen.after_step, strict=True)), "the steps are the same"

    average, averages = {name: tensor.float() for name, tensor in start.items()}, []
    for step, now in enumerate(seen.after_step, 1):
        decay = min(0.999, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * now[name] for name in now}
        averages.append(average)
    for found, expected in ((seen.evaluated[0], averages[2]), (weights(model), averages[5])):
        for name in expected:
            assert torch.allclose(found[name], expected[name], atol=1e-6), name
    saved = load_file(tmp_path / "ema" / "checkpoint-6" / "adapter_model.safetensors")
    beside = load_file(tmp_path / "ema" / "checkpoint-6" / FILE)
    assert same(beside, seen.after_step[5])
    name = next(n for n in saved if n.endswith("classifier.weight") or ("classifier" in n and n.endswith("weight")))
    mine = next(n for n in averages[5] if "classifier" in n and n.endswith("weight"))
    assert torch.allclose(saved[name], averages[5][mine], atol=1e-6)


def test_a_resumed_run_is_the_run(make_model, tmp_path):
    def run(folder, steps, resume=None):
        model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
        trainer = trainer_of(model, folder, TrainedEMA(model), max_steps=steps)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "cut", 3)
    resumed = run(tmp_path / "cut", 6, resume=True)
    assert same(weights(whole.model), weights(resumed.model))
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert [e["eval_loss"] for e in resumed.state.log_history if "eval_loss" in e] == losses
    assert all(math.isfinite(loss) for loss in losses)
    (tmp_path / "cut" / "checkpoint-6" / FILE).unlink()
    with pytest.raises(AdapterFileError, match="its run had no TrainedEMA"):
        run(tmp_path / "cut", 9, resume=True)


def test_a_finished_run_that_is_resumed_keeps_its_average(make_model, tmp_path):
    def run(resume=None):
        model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
        trainer = trainer_of(model, tmp_path, TrainedEMA(model), max_steps=4, save_steps=4)  # one epoch
        trainer.train(resume_from_checkpoint=resume)
        return weights(model)

    assert same(run(), run(resume=True))


def test_the_best_checkpoints_average_is_kept(make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    trainer = trainer_of(
        model, tmp_path, TrainedEMA(model), load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)
