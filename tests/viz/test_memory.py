from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, InputError
from peft_bsr.cost import compare, saved_activations
from peft_bsr.viz import draw_saved_memory, saved_by_block


@pytest.fixture
def batch(images):
    return {"pixel_values": images, "labels": torch.tensor([0, 1])}


def test_parts_add_up_to_what_is_saved(make_model, batch):
    for model in (
        make_model(),
        get_peft_model(make_model(), BSRConfig(reduction_blocks=[1])),
        get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])),
    ):
        parts = saved_by_block(model.eval(), batch)
        assert list(parts) == ["embeddings", "0", "1", "2", "3", "head"]
        assert not model.training
        assert 2 * sum(parts.values()) == saved_activations(model.train(), lambda m=model: m(**batch).loss)


def test_frozen_leading_blocks_keep_nothing(make_model, batch):
    model = get_peft_model(make_model(), BSRConfig(trainable_blocks=[2], reduction_blocks=[]))
    parts = saved_by_block(model, batch)
    assert parts["embeddings"] == parts["0"] == parts["1"] == 0
    assert min(parts["2"], parts["3"], parts["head"]) > 0


def test_a_linear_probe_keeps_what_its_head_needs(make_model, batch):
    model = make_model().requires_grad_(False)
    model.classifier.requires_grad_(True)
    parts = saved_by_block(model, batch)
    assert parts.pop("head") > 0
    assert not any(parts.values())


def test_block_10_is_not_block_1(batch):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 16}
    vit = ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=11))
    parts = saved_by_block(get_peft_model(vit, BSRConfig(trainable_blocks=[10], reduction_blocks=[])), batch)
    assert parts["10"] > 0 and not any(parts[str(index)] for index in range(10))


def test_the_picture(make_model, batch, tmp_path):
    models = {"full fine-tuning": make_model(), "BSR": get_peft_model(make_model(), BSRConfig())}
    path = draw_saved_memory(models, batch, tmp_path / "memory.png")
    with Image.open(path) as picture:
        assert picture.width > picture.height


def test_models_of_one_depth(make_model, batch, tmp_path):
    models = {"vit": make_model(), "deit": make_model("deit")}
    draw_saved_memory(models, batch, tmp_path / "memory.png")
    with pytest.raises(InputError, match=r"must have the same depth, found \{\}"):
        draw_saved_memory({}, batch, tmp_path / "memory.png")


@pytest.mark.parametrize("measure", [saved_by_block, lambda model, batch: compare({"ALaST": model}, batch, repeats=2)])
def test_measuring_leaves_no_trace(measure, make_model, batch):
    """Neither on ALaST's budgets and draws, which a training forward behind a step moves, nor on modes that differ."""
    model = get_peft_model(make_model(), ALaSTConfig(trainable_blocks_per_step=2, selection="sample")).train()
    schedule = model.base_model.schedule()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.base_model.model.vit.embeddings.eval()

    def state():
        asking = [p.requires_grad for p in model.parameters()]
        return schedule.pack(), schedule.selected, asking, [module.training for module in model.modules()]

    (packed, *before), _ = state(), measure(model, batch)
    assert torch.equal(schedule.pack(), packed)
    assert list(state()[1:]) == before
