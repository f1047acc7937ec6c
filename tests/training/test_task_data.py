"""Data, samplers and metrics of several tasks; the Trainer's path."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate.data_loader import skip_first_batches
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, MoEConfig, TaskConfig
from peft_bsr.training import TaskBatchSampler, TaskDataset, collate_tasks
from peft_bsr.training.metrics import MeanIoU, RootMeanSquaredError, TaskAccuracy, add_outputs, metric_of

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}


def examples(count, classes):
    return [{"pixel_values": torch.full((3, 32, 32), i / count), "labels": i % classes} for i in range(count)]


@pytest.fixture
def data():
    return TaskDataset({"a": examples(40, 5), "b": examples(10, 3)})


def tasks_of(data, sampler):
    return [data[batch[0]]["task_ids"] for batch in sampler]


def test_batches_are_full_and_of_one_task_each(data):
    for strategy in ("round_robin", "proportional", "temperature"):
        for batch in TaskBatchSampler(data, 4, strategy):
            assert len({data[i]["task_ids"] for i in batch}) == 1 and len(batch) == 4


def test_every_example_of_a_task_comes_before_any_comes_again(data):
    seen = Counter(i for batch in TaskBatchSampler(data, 4) for i in batch if i >= 40)
    assert set(seen) == set(range(40, 50)) and max(seen.values()) - min(seen.values()) <= 1


def test_strategies(data):
    turns = tasks_of(data, TaskBatchSampler(data, 4))
    assert turns == [0, 1] * (len(turns) // 2)
    for strategy, share in (("proportional", 0.2), ("temperature", 1 / 3)):
        turns = tasks_of(data, TaskBatchSampler(data, 4, strategy, num_batches=2000))
        assert sum(turns) / 2000 == pytest.approx(share, abs=0.04)


def test_epochs_differ_and_repeat_and_resume(data):
    sampler = TaskBatchSampler(data, 4, "temperature")
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate_tasks)
    whole, rest = list(loader), list(skip_first_batches(loader, 3))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.parametrize("settings", [{"strategy": "fair"}, {"batch_size": 0}, {"temperature": 0}, {"num_batches": 0}])
def test_what_cannot_be_sampled_is_refused(data, settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))}"):
        TaskBatchSampler(**{"data": data, "batch_size": 2, **settings})


def test_labels_of_several_shapes_stay_a_list():
    pixels = torch.zeros(3, 8, 8)
    maps = [
        {"pixel_values": pixels, "label": 1, "task": "a"},
        {"pixel_values": pixels, "label": [1.0, 2.0], "task": "b"},
    ]
    batch = collate_tasks(maps)
    assert batch["task"] == ["a", "b"] and isinstance(batch["labels"], list)
    assert torch.equal(collate_tasks(maps[:1])["labels"], torch.tensor([1]))


def test_metrics():
    accuracy = TaskAccuracy()
    accuracy.add_batch(predictions=[0, 1], references=[0, 0], tasks=["x", "x"])
    accuracy.add_batch(predictions=[3], references=[3], tasks=["y"])
    assert accuracy.compute() == {"x": 0.5, "y": 1.0, "mean": 0.75}
    maps = MeanIoU().compute(predictions=[[0, 1, 1], [2, 2]], references=[[0, 0, 1], [255, 2]])
    assert maps["mean_iou"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    rmse = RootMeanSquaredError().compute(predictions=[[1.0, 9.0]], references=[[3.0, float("nan")]])
    assert rmse == {"rmse": 2.0}


def test_outputs_of_every_kind_reach_their_metric():
    task = TaskConfig("m", 2, "segmentation")
    metric = metric_of(task)
    maps = torch.zeros(1, 2, 2, 2)
    maps[:, 1, :, 1] = 5
    maps[:, 1, :, 0] = -5
    add_outputs(metric, task, maps, torch.tensor([[[0, 0, 1, 1]] * 4]))
    assert metric.compute() == {"mean_iou": 1.0}
    task = TaskConfig("d", 1, "regression_map")
    metric = metric_of(task)
    add_outputs(metric, task, torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 4, 4))
    assert metric.compute() == {"rmse": 2.0}
    task = TaskConfig("c", 3)
    metric = metric_of(task)
    add_outputs(metric, task, torch.eye(3), torch.tensor([0, 1, 0]))
    assert metric.compute()["mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_takes_a_task_column(tmp_path, accumulation):
    """Two steps of accumulation give the weights of one step on the whole, and each task is evaluated on its own."""
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_labels=3, **TINY))
    config = BSRConfig(tasks={"a": 5, "b": 3}, moe=MoEConfig(3, 2), trainable_blocks=[1], reduction_blocks=[1])
    model = get_peft_model(base, config)
    rows = [dict(e, task="a") for e in examples(6, 5)] + [dict(e, task="b") for e in examples(6, 3)]
    rows = rows[::2] + rows[1::2]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=12 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset={name: [row for row in rows if row["task"] == name] for name in ("a", "b")},
        data_collator=collate_tasks,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_a_accuracy", "eval_b_accuracy", "eval_a_loss"} <= set(metrics)
    torch.manual_seed(0)
    reference = ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_labels=3, **TINY))
    reference = get_peft_model(reference, config).train()
    batch = collate_tasks(rows)
    reference(**batch).loss.backward()
    for (name, trained), start in zip(model.named_parameters(), reference.parameters(), strict=True):
        if start.requires_grad:
            torch.testing.assert_close(trained, start - 0.1 * start.grad, atol=1e-5, rtol=1e-4, msg=name)
