"""Adding a task to a trained adapter, and exporting one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import DINOv3ViTConfig, DINOv3ViTModel

import peft_bsr
from peft_bsr import AdapterError, BSRConfig, TaskConfig, add_task, export_task, with_head

pytestmark = pytest.mark.sampled(2)

NAMES = ["zoo", "digits", "clothes"]


def test_an_added_task_leaves_the_others_alone_and_learns(model, make_vit, images, run, tmp_path):
    before = [run(model, images, task=task) for task in NAMES]
    add_task(model, "signs", 7)
    assert [task.name for task in model.peft_config["default"].tasks] == [*NAMES, "signs"]
    for task, expected in zip(NAMES, before, strict=True):
        assert torch.equal(run(model, images, task=task), expected)
    assert run(model, images, task="signs").shape == (6, 7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model.train()(pixel_values=images, task="signs", labels=torch.arange(6)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = run(model.eval(), images, task="signs")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert torch.equal(run(loaded, images, task="signs"), trained)
    assert torch.equal(run(loaded, images, task_ids=[3] * 6), trained)


def test_the_users_config_is_not_changed(make_vit, make_config):
    config = make_config()
    add_task(get_peft_model(make_vit(), config), "signs", 7)
    assert [task.name for task in config.tasks] == NAMES


@pytest.mark.parametrize("task", NAMES)
def test_an_exported_task_is_a_single_task_adapter(model, make_vit, images, run, tmp_path, task):
    expected = run(model, images, task=task)
    export_task(model, task, tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path, adapter_name="mine").eval()
    assert torch.equal(run(loaded, images), expected)
    assert [t.name for t in loaded.peft_config["mine"].tasks] == [task]
    gates = [p for name, p in loaded.named_parameters() if "gates" in name]
    assert all(gate.shape[0] == 1 for gate in gates) and len(gates) == 2


def test_dense_blocks_too(make_vit, images, run, tmp_path):
    config = BSRConfig(tasks={"a": 2, "b": 5}, trainable_blocks=[3], init_weights=False)
    model = get_peft_model(make_vit(), config).eval()
    add_task(model, "c", 4)
    export_task(model, "b", tmp_path)
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path).eval()
    assert torch.equal(run(loaded, images), run(model, images, task="b"))


def test_an_exported_task_on_a_model_without_a_head_is_loaded(images, run, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "base")
    base = with_head(DINOv3ViTModel.from_pretrained(tmp_path / "base"), 3)
    model = get_peft_model(base, BSRConfig(trainable_blocks=[1], tasks={"a": 2, "b": 5}, init_weights=False)).eval()
    export_task(model, "b", tmp_path / "one")
    assert torch.equal(run(peft_bsr.load(tmp_path / "one"), images), run(model, images, task="b"))


def test_what_cannot_be_is_refused(model, make_vit, tmp_path):
    with pytest.raises(AdapterError, match="already has a task 'zoo'"):
        add_task(model, "zoo", 3)
    with pytest.raises(AdapterError, match="`num_outputs=0` must be"):
        add_task(model, "signs", 0)
    with pytest.raises(AdapterError, match="'default' shortens the sequence"):
        add_task(model, "scenes", TaskConfig("scenes", 3, "segmentation"))
    with pytest.raises(AdapterError, match=r"no task 'cars'; its tasks are \['zoo', 'digits', 'clothes'\]"):
        export_task(model, "cars", tmp_path)
    with pytest.raises(AdapterError, match="'default' has no tasks"):
        add_task(get_peft_model(make_vit(), BSRConfig()), "signs", 3)
