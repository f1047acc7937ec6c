"""Losses against their formulas, and in Trainer with accumulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from peft_bsr import ConfigError, InputError
from peft_bsr.training import MixupDataset, TrainingLoss, balanced_weights


def logits_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_weighted_cross_entropy_is_a_mean_over_images():
    logits, labels, weights = logits_of(4, 3), torch.tensor([0, 2, 2, 1]), [0.5, 1.0, 2.0]
    log_p = torch.log_softmax(logits, -1).detach().numpy()
    expected = np.mean([-weights[y] * log_p[i, y] for i, y in enumerate(labels.tolist())])
    loss = TrainingLoss(class_weights=weights)({"logits": logits}, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    soft = functional.one_hot(labels, 3).float()
    assert TrainingLoss(class_weights=weights)({"logits": logits}, soft).item() == pytest.approx(expected, rel=1e-6)


def test_soft_labels_with_smoothing():
    logits, soft = logits_of(2, 3), torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    log_p = torch.log_softmax(logits, -1)
    expected = -((soft * 0.9 + 0.1 / 3) * log_p).sum(-1).mean()
    assert TrainingLoss(label_smoothing=0.1)({"logits": logits}, soft).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])])
def test_evaluation_gets_the_plain_loss(labels):
    logits = logits_of(2, 3).detach()
    plain = functional.cross_entropy(logits, labels)
    loss = TrainingLoss(class_weights=[1.0, 5.0, 9.0], label_smoothing=0.3)({"logits": logits}, labels)
    assert loss.item() == pytest.approx(plain.item())


def test_several_labels_and_numbers():
    logits = logits_of(4, 3)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    expected = functional.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=torch.tensor([1.0, 2, 3]))
    loss = TrainingLoss("multi_label_classification", class_weights=[1.0, 2.0, 3.0])({"logits": logits}, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    one = logits_of(4, 1)
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss = TrainingLoss("regression")({"logits": one}, targets)
    assert loss.item() == pytest.approx(((one.squeeze(1) - targets) ** 2).mean().item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("is_soft", [False, True])
def test_accumulated_batches_give_the_mean_of_one(kind, is_soft):
    logits = logits_of(6, 3)
    labels = torch.rand(6, 3) if is_soft or kind != "single_label_classification" else torch.tensor([0, 1, 2, 0, 1, 2])
    loss = TrainingLoss(kind)
    count = labels.ne(-100).sum()  # as Trainer counts
    parts = [loss({"logits": logits[a:b]}, labels[a:b], num_items_in_batch=count) for a, b in ((0, 4), (4, 6))]
    assert sum(parts).item() == pytest.approx(loss({"logits": logits}, labels).item(), rel=1e-6)


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert balanced_weights(labels).numpy() == pytest.approx(expected)
    assert balanced_weights(labels, 4)[3] == 1, "a class without images"
    several = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 0]])
    assert balanced_weights(several).tolist() == pytest.approx([1 / 3, 3.0])
    assert balanced_weights(several[:3]).tolist() == [1.0, 2.0], "a label of all images would have no loss"


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="label_smoothing=1"):
        TrainingLoss(label_smoothing=1)
    with pytest.raises(ConfigError, match="`problem_type='words'` is unknown"):
        TrainingLoss("words")
    with pytest.raises(ConfigError, match="no classes to weight"):
        TrainingLoss("regression", class_weights=[1.0])
    with pytest.raises(InputError, match="`class_weights` has 2 numbers, but the model has 3"):
        TrainingLoss(class_weights=[1.0, 2.0])({"logits": logits_of(2, 3)}, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="do not fit the logits"):
        TrainingLoss("regression")({"logits": logits_of(2, 3)}, torch.tensor([0.0, 1.0]))
    with pytest.raises(ConfigError, match="do not fit 2 classes"):
        balanced_weights([0, 5], 2)


def examples(count=8):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": i % 3} for i in range(count)]


@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_plain_trainer_accumulates_as_if_batches_were_large(is_mixed, make_model, tmp_path):
    losses = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = make_model(hidden_dropout_prob=0.0)
        data = MixupDataset(examples(), 3, probability=0.0) if is_mixed else examples()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no", logging_steps=1,
            label_names=["labels"],
        )  # fmt: skip
        loss = TrainingLoss(class_weights=[1.0, 2.0, 3.0], label_smoothing=0.1)
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=examples(), compute_loss_func=loss)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert trainer.evaluate()["eval_loss"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
