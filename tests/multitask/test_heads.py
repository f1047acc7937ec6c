"""Heads of all kinds, their losses, and dense tasks under token reduction."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, interpolate

from peft_bsr import AdapterError, BSRConfig, TaskConfig
from peft_bsr.multitask import task_loss

pytestmark = pytest.mark.sampled(2)

TASKS = {
    "kinds": 3,
    "angle": TaskConfig("angle", 2, "regression"),
    "parts": TaskConfig("parts", 4, "segmentation"),
    "depth": TaskConfig("depth", 1, "regression_map"),
}
SHAPES = {"kinds": (6, 3), "angle": (6, 2), "parts": (6, 4, 4, 4), "depth": (6, 1, 4, 4)}
LABELS = {
    "kinds": torch.tensor([0, 1, 2, 0, 1, 2]),
    "angle": torch.linspace(-1, 1, 12).view(6, 2),
    "parts": torch.arange(6 * 32 * 32).view(6, 32, 32) % 4,
    "depth": torch.linspace(0, 1, 6 * 32 * 32).view(6, 1, 32, 32),
}


@pytest.fixture
def dense(make_vit, make_config):
    torch.manual_seed(3)
    return get_peft_model(make_vit(), make_config(tasks=TASKS)).eval()


def test_every_kind_has_its_shape_and_reloads(dense, make_vit, images, run, tmp_path):
    assert dense.base_model.plan().mode == "full_view"
    dense.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, adapter_name="again").eval()
    for task, shape in SHAPES.items():
        found = run(dense, images, task=task)
        assert found.shape == shape
        assert torch.equal(run(loaded, images, task=task), found)


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_learns(dense, images, task):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in dense.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = dense.train()(pixel_values=images, task=task, labels=LABELS[task]).loss
        loss.backward()
        assert all(p.grad is not None for p in dense.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_mixed_batch_of_all_kinds(dense, images, run):
    ids = torch.tensor([0, 1, 2, 3, 2, 0])
    labels = {task: LABELS[task][ids == i] for i, task in enumerate(TASKS)}
    output = dense.train()(pixel_values=images, task_ids=ids, labels=labels)
    output.loss.backward()
    assert set(output.logits) == set(TASKS)
    by_image = [LABELS[list(TASKS)[i]][row] for row, i in enumerate(ids.tolist())]
    again = dense(pixel_values=images, task_ids=ids, labels=by_image)
    torch.testing.assert_close(again.loss, output.loss)
    mixed = run(dense.eval(), images, task_ids=ids)
    for index, task in enumerate(TASKS):
        alone = run(dense, images[ids == index], task=task)
        torch.testing.assert_close(mixed[task], alone, atol=1e-5, rtol=1e-5)


def test_dense_outputs_stand_where_their_patches_are(make_vit, run):
    """Nothing mixes patches here, so that an image with one other patch has one other output."""
    config = BSRConfig(tasks={"parts": TASKS["parts"]}, trainable_blocks=[3], keep_rate=1.0)
    stock = make_vit()
    with torch.no_grad():
        for layer in stock.vit.layers:
            layer.attention.o_proj.weight.zero_()
    model = get_peft_model(stock, config).eval()
    first = torch.zeros(1, 3, 32, 32)
    second = first.clone()
    second[:, :, 8:16, 24:] = 1
    changed = (run(model, first) - run(model, second)).abs().sum(1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]


def test_dense_tasks_do_not_shorten_the_last_block_in_training(make_vit, make_config, images):
    config = make_config(tasks={"parts": TASKS["parts"], "kinds": 3}, keep_rate=1.0)
    model = get_peft_model(make_vit(), config)
    plan = model.base_model.plan()
    assert plan.mode == "full_view" and plan.blocks[-1].lean.num_queries is None
    loss = model.train()(pixel_values=images, task="parts", labels=LABELS["parts"]).loss
    torch.testing.assert_close(model.eval()(pixel_values=images, task="parts", labels=LABELS["parts"]).loss, loss)


def test_a_list_of_labels_is_taken_also_where_the_batch_has_one_task(dense, images):
    """A collator that builds lists, for labels of several shapes, does not know which tasks a batch has."""
    for task in TASKS:
        expected = dense(pixel_values=images, task=task, labels=LABELS[task]).loss
        torch.testing.assert_close(dense(pixel_values=images, task=task, labels=list(LABELS[task])).loss, expected)
    uneven = [torch.zeros(size, size, dtype=torch.long) for size in (4, 4, 8, 4, 4, 4)]
    with pytest.raises(AdapterError, match=r"`labels` of task 'parts' have the shapes \[\(4, 4\), \(8, 8\)\]"):
        dense(pixel_values=images, task="parts", labels=uneven)


def test_losses():
    maps, labels = torch.randn(2, 4, 2, 2), torch.randint(4, (2, 6, 6))
    labels[0, :2] = 255
    expected = cross_entropy(interpolate(maps, (6, 6), mode="bilinear"), labels, ignore_index=255)
    torch.testing.assert_close(task_loss(TaskConfig("a", 4, "segmentation"), maps, labels), expected)
    ignored = task_loss(TaskConfig("a", 4, "segmentation"), maps, torch.full((2, 6, 6), 255))
    assert ignored == 0
    depth, truth = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 2.0)
    truth[0, 0, 0, 0] = torch.nan
    assert task_loss(TaskConfig("d", 1, "regression_map"), depth, truth) == 4
    assert task_loss(TaskConfig("r", 1, "regression"), torch.zeros(3, 1), [1.0, 1.0, 2.0]) == 2


def test_the_order_of_keyword_arguments_does_not_matter(dense, images):
    """Rows of a dataset often start with the labels; the patch grid is that of the images."""
    small = LABELS["depth"][:, :, :16, :16]
    first = dense(labels=small, pixel_values=images, task="depth")
    assert first.logits.shape == SHAPES["depth"]
    torch.testing.assert_close(first.loss, dense(pixel_values=images, labels=small, task="depth").loss)


def test_ignored_labels_do_not_change_the_loss_of_an_accumulated_step(dense, images):
    """Trainer counts the labels that are not -100, in all batches of the step."""
    labels = torch.tensor([0, -100, 2, -100, 1, -100])
    alone = dense(pixel_values=images, task="kinds", labels=labels).loss
    counted = dense(pixel_values=images, task="kinds", labels=labels, num_items_in_batch=torch.tensor(3)).loss
    torch.testing.assert_close(counted, alone)
    half = dense(pixel_values=images, task="kinds", labels=labels, num_items_in_batch=torch.tensor(6)).loss
    torch.testing.assert_close(half, alone / 2)
