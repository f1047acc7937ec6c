"""The Trainer with a BSR adapter: what trains, what is saved, resuming, and loading the best model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from peft_bsr import BSRConfig


class Blobs(Dataset):
    """Three classes of noisy images, each bright in one colour."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(length) % 3
        self.images = torch.randn(length, 3, 32, 32, generator=generator)
        for image, label in zip(self.images, self.labels, strict=True):
            image[label] += 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def make_trainer(model: torch.nn.Module, folder: Path, **arguments: object) -> Trainer:
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 6,
        "eval_steps": 6,
        "eval_strategy": "steps",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
        **arguments,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=Blobs(96, seed=0),
        eval_dataset=Blobs(30, seed=1),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def bsr(make_model, **config: object) -> PeftModel:
    set_seed(0)
    return get_peft_model(make_model(), BSRConfig(trainable_blocks=[1, 3], reduction_blocks=[1, 2], **config))


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_training_learns_and_touches_nothing_else(trainable, make_model, tmp_path):
    model = bsr(make_model, trainable=trainable)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(model, tmp_path, max_steps=40, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.2
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())
    unchanged = [name for name, tensor in start.items() if torch.equal(parameters[name], tensor)]
    assert not unchanged


def test_labels_are_found_and_predictions_come_out(make_model, tmp_path):
    trainer = make_trainer(bsr(make_model), tmp_path)
    assert trainer.label_names == ["labels"]
    prediction = trainer.predict(Blobs(6, seed=2))
    assert prediction.predictions.shape == (6, 3)
    assert "test_accuracy" in prediction.metrics


def test_checkpoints_hold_the_adapter_only(make_model, tmp_path):
    model = bsr(make_model)
    make_trainer(model, tmp_path).train()
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin"}
    saved = load_file(tmp_path / "checkpoint-12" / "adapter_model.safetensors")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in saved.values()) == trained


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_model, tmp_path):
    whole = bsr(make_model)
    make_trainer(whole, tmp_path / "whole").train()
    resumed = bsr(make_model)
    trainer = make_trainer(resumed, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert trainer.state.global_step == 12
    expected = dict(whole.named_parameters())
    differing = [name for name, p in resumed.named_parameters() if not torch.equal(p, expected[name])]
    assert not differing


def test_the_best_model_is_loaded_at_the_end(make_model, tmp_path):
    model = bsr(make_model)
    trainer = make_trainer(
        model,
        tmp_path,
        learning_rate=1e-3,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # of a falling loss the first checkpoint is the "best", so that loading shows
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-6"
    saved = load_file(best / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_gradient_accumulation_equals_the_large_batch(make_model, tmp_path):
    models = []
    for steps, size in ((1, 8), (4, 2)):
        model = bsr(make_model)
        make_trainer(
            model,
            tmp_path / str(steps),
            max_steps=2,
            save_strategy="no",
            optim="sgd",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        ).train()
        models.append(dict(model.named_parameters()))
    for name, expected in models[0].items():
        torch.testing.assert_close(models[1][name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_by_the_trainer_changes_nothing(use_reentrant, make_model, tmp_path):
    plain, checkpointed = bsr(make_model), bsr(make_model)
    settings = {"max_steps": 3, "save_strategy": "no", "optim": "sgd"}
    make_trainer(plain, tmp_path / "plain", **settings).train()
    make_trainer(
        checkpointed,
        tmp_path / "checkpointed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        **settings,
    ).train()
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)


def test_bf16_training_gives_finite_losses(make_model, tmp_path):
    trainer = make_trainer(bsr(make_model), tmp_path, bf16=True, use_cpu=True, max_steps=3, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(loss == loss for loss in losses)


def test_a_checkpoint_reloads_on_a_fresh_base(make_model, tmp_path):
    model = bsr(make_model)
    make_trainer(model, tmp_path).train()
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path / "checkpoint-12").eval()
    images = Blobs(4, seed=3).images
    assert torch.equal(reloaded(images).logits, model.eval()(images).logits)
    config = json.loads((tmp_path / "checkpoint-12" / "adapter_config.json").read_text())
    assert (config["trainable_blocks"], config["reduction_blocks"]) == ([1, 3], [1, 2])
