"""The first loss that is not finite ends the run; its batch can be replayed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_bsr import BSRConfig, NonFiniteLossError
from peft_bsr.training import NonFiniteLossCallback, TrainingLoss


def data(bad=None):
    generator = torch.Generator().manual_seed(0)
    examples = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3} for i in range(16)]
    if bad is not None:
        examples[bad]["pixel_values"][0, 0, 0] = float("nan")
    return examples


def train(model, folder, dataset, loss=None, **settings):
    callback = NonFiniteLossCallback(folder / "kept")
    arguments = TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, save_strategy="no", label_names=["labels"], **settings,
    )  # fmt: skip
    loss = None if loss is None else callback.watch(loss)
    try:
        Trainer(model, arguments, train_dataset=dataset, compute_loss_func=loss, callbacks=[callback]).train()
    finally:
        assert not model._forward_hooks
    return callback


@pytest.mark.parametrize("loss", [None, TrainingLoss()], ids=["model's loss", "compute_loss_func"])
def test_the_batch_of_a_bad_image_is_kept(loss, make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    with pytest.raises(NonFiniteLossError, match=r"the loss of step \d is not finite. The trained weights are finite"):
        train(model, tmp_path, data(bad=5), loss)
    (path,) = (tmp_path / "kept").iterdir()
    batch = torch.load(path)
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert batch["labels"].shape == (4,)
    assert batch["pixel_values"].isnan().any()
    assert not model(**batch).loss.isfinite(), "replayed"


def test_a_run_that_diverged_is_told_its_learning_rate(make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    with pytest.raises(NonFiniteLossError, match=r"previous steps were too large. Lower the learning rate \(1e\+38"):
        train(model, tmp_path, data(), learning_rate=1e38, lr_scheduler_type="constant", max_grad_norm=0.0)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_good_run_is_left_alone(is_compiled, make_model, tmp_path):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks="last:2"))
    train(model, tmp_path, data(), TrainingLoss(), **({"torch_compile_backend": "eager"} if is_compiled else {}))
    assert not (tmp_path / "kept").exists()
    assert not model._forward_pre_hooks
