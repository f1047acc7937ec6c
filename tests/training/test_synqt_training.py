"""SynQT in the Trainer, from images and from a cache of what the queries read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, set_seed

from peft_bsr import FeatureCache, FeatureCacheError, SynQTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parent))

from families import SUPPORTED
from test_trainer import Blobs

pytestmark = pytest.mark.sampled(2)

DATA = Blobs(21, seed=0)
SMALL = {"num_queries": 2, "bottleneck": 8, "attention_bottleneck": 4}


def synqt(make_model, **settings) -> PeftModel:
    set_seed(0)
    return get_peft_model(make_model(), SynQTConfig(**SMALL, **settings))


def make_trainer(model, folder, **arguments) -> Trainer:
    settings = {"max_steps": 12, "save_steps": 6, "eval_steps": 6, "eval_strategy": "steps", "seed": 0}
    settings |= {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1, "report_to": "none"}
    settings |= {"dataloader_pin_memory": False, "disable_tqdm": True, "remove_unused_columns": False, **arguments}
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), label_names=["labels"], **settings),
        train_dataset=Blobs(96, seed=0),
        eval_dataset=Blobs(30, seed=1),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(4)  # the same dropout
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_training_learns_and_touches_nothing_else(make_model, tmp_path):
    model = synqt(make_model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer(model, tmp_path, max_steps=40, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before - 0.2 and after["eval_accuracy"] > 0.6
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())


def test_a_resumed_run_equals_an_uninterrupted_one_and_a_checkpoint_reloads(make_model, tmp_path):
    whole = synqt(make_model)
    make_trainer(whole, tmp_path / "whole").train()
    resumed = synqt(make_model)
    make_trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    expected = dict(whole.named_parameters())
    assert not [name for name, p in resumed.named_parameters() if not torch.equal(p, expected[name])]
    saved = load_file(tmp_path / "whole" / "checkpoint-12" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == whole.get_nb_trainable_parameters()[0]
    reloaded = PeftModel.from_pretrained(make_model(), tmp_path / "whole" / "checkpoint-12").eval()
    images = Blobs(4, seed=3).images
    torch.testing.assert_close(reloaded(images).logits, whole.eval()(images).logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", ["compact", "full_view"])
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=repr)
@pytest.mark.parametrize("keep_rate", [1.0, 0.5])
def test_training_from_the_cache_is_training_from_images(make_model, tmp_path, keep_rate, layers, mode):
    model = synqt(make_model, keep_rate=keep_rate, reduction_blocks=[0, 1], layers=layers, mode=mode).train()
    cache = FeatureCache.build(model, DATA, tmp_path, dtype=torch.float32, batch_size=4, progress=False)
    assert model.training and len(cache) == len(DATA)
    ran = []
    for block in model.get_base_model().vit.layers:
        for module in block.children():
            if module is not block.token_router:
                module.register_forward_hook(lambda m, a, o: ran.append((type(m).__name__, a[0].shape[1])))
    with cache.read_by(model):
        for images, tokens in zip(DataLoader(DATA, 8), DataLoader(cache, 8), strict=True):
            expected = gradients(model, images)
            ran.clear()
            found = gradients(model, tokens)
            assert {length for _, length in ran} == {2}, "only queries pass through the blocks"
            assert "ViTAttention" not in {name for name, _ in ran}
            assert expected.keys() == found.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["deit", "dinov2", "clip", "siglip", "beit", "vivit", "videomae"])
def test_every_kind_of_block_is_cached(tmp_path, family):
    torch.manual_seed(0)
    model = get_peft_model(SUPPORTED[family](), SynQTConfig(**SMALL)).eval()
    name, shape = model.base_model.model.main_input_name, model.base_model.spec.image_shape
    data = [{name: torch.randn(*shape)} for _ in range(3)]
    cache = FeatureCache.build(model, data, tmp_path, dtype=torch.float32, progress=False)
    with cache.read_by(model), torch.no_grad():
        batch, images = next(iter(DataLoader(cache, 3))), next(iter(DataLoader(data, 3)))
        torch.testing.assert_close(model(**batch).logits, model(**images).logits, atol=1e-5, rtol=1e-4)


def test_padding_is_not_in_the_cache_and_refused(tmp_path):
    model = get_peft_model(SUPPORTED["siglip2"](), SynQTConfig(**SMALL)).eval()
    mask = torch.tensor([1] * 12 + [0] * 4)
    data = [
        {"pixel_values": torch.randn(16, 192), "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([3, 4])}
        for _ in range(2)
    ]
    with pytest.raises(FeatureCacheError, match="it reads more than these tokens"):
        FeatureCache.build(model, data, tmp_path, dtype=torch.float32, progress=False)


def test_disk_use_is_one_token_tensor_a_layer_and_said_before_it_starts(make_model, tmp_path, capsys):
    model = synqt(make_model, keep_rate=0.5, reduction_blocks=[1])
    cache = FeatureCache.build(model, DATA, tmp_path)
    tokens = 17 + 17 + 10 + 10
    assert cache[0]["cached_tokens"].shape == (tokens, 32)
    assert "Feature cache: 21 samples of 3 KiB" in capsys.readouterr().err
    assert (tmp_path / "cached_tokens.bin").stat().st_size == 21 * tokens * 32 * 2


def test_a_cache_of_something_else_is_refused(make_model, tmp_path):
    model = synqt(make_model)
    cache = FeatureCache.build(model, DATA, tmp_path, progress=False)
    for other, word in (
        (synqt(make_model, layers=[0, 1]), "layers"),
        (synqt(make_model, keep_rate=0.5, reduction_blocks=[1]), "reductions"),
    ):
        with pytest.raises(FeatureCacheError, match=f"belongs to something else: .*{word} is "), cache.read_by(other):
            pass
    changed = synqt(make_model)
    with torch.no_grad():
        changed.base_model.model.vit.layers[3].layernorm_before.weight[0] += 1e-3
    with pytest.raises(FeatureCacheError, match="leading_weights is "), cache.read_by(changed):
        pass
    with torch.no_grad():  # what trains may change
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    with cache.read_by(model):
        batch = next(iter(DataLoader(cache, 2)))
        model.add_adapter("second", SynQTConfig(**SMALL, layers=[1]))
        model.set_adapter("second")
        with pytest.raises(FeatureCacheError, match="the adapter of the cache is not active"):
            model(**batch)


def test_the_trainer_takes_the_cache_and_evaluates_on_images(make_model, tmp_path):
    model = synqt(make_model)
    cache = FeatureCache.build(model, Blobs(96, seed=0), tmp_path / "cache", progress=False)
    with cache.read_by(model):
        trainer = make_trainer(model, tmp_path / "out", max_steps=40, save_strategy="no", eval_strategy="no")
        trainer.train_dataset = cache
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before - 0.2
    plain = synqt(make_model)
    with torch.no_grad():
        images = Blobs(4, seed=3).images
        expected = model.eval()(images).logits
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain.eval()(images).logits, expected)


def test_a_forward_that_failed_leaves_nothing_behind(make_model, tmp_path):
    model = synqt(make_model).eval()
    cache = FeatureCache.build(model, DATA, tmp_path, progress=False)
    images, batch = next(iter(DataLoader(DATA, 2))), next(iter(DataLoader(cache, 2)))
    with torch.no_grad(), cache.read_by(model):
        expected = model(**images).logits
        with pytest.raises(ValueError, match="batch_size"):
            model(**{**batch, "labels": torch.zeros(5, dtype=torch.long)})
        assert torch.equal(model(**images).logits, expected)
        model(**batch)
