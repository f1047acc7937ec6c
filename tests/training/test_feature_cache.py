"""The feature cache: the same training from disk, refused where it would not be the same."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, FeatureCache, FeatureCacheError, InputError
from peft_bsr.training import cache_files

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
sys.path.insert(0, str(Path(__file__).parent))

from families import SUPPORTED
from test_trainer import Blobs

pytestmark = pytest.mark.sampled(2)

DATA = Blobs(21, seed=0)


def vit(config: dict[str, object] | None = None, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"image_size": 32, "patch_size": 8, "num_labels": 3, **(config or {})}
    return get_peft_model(
        ViTForImageClassification(ViTConfig(**sizes)), BSRConfig(**{"trainable_blocks": [2, 3], **settings})
    )


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["compact", "full_view"])
@pytest.mark.parametrize("reductions", [[], [3], [0, 1, 2]])
def test_training_from_the_cache_is_training_from_images(tmp_path, reductions, mode):
    model = vit(reduction_blocks=reductions, mode=mode, init_weights=False).train()
    cache = FeatureCache.build(model, DATA, tmp_path, dtype=torch.float32, batch_size=4, progress=False)
    assert model.training and len(cache) == len(DATA)
    batches = zip(DataLoader(DATA, 8), DataLoader(cache, 8), strict=True)
    with cache.read_by(model):
        for images, tokens in batches:
            assert ("cached_origins" in tokens) == (0 in reductions)
            expected, found = gradients(model, images), gradients(model, tokens)
            assert expected.keys() == found.keys()
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)
    with pytest.raises(InputError, match="`pixel_values` is NoneType"):
        model(**next(iter(DataLoader(cache, 8))))


@pytest.mark.parametrize("family", ["deit_teacher", "clip", "siglip", "dinov2", "dinov3", "beit", "vivit", "yolos"])
def test_every_kind_of_block_can_begin_in_the_middle(tmp_path, family):
    torch.manual_seed(0)
    model = get_peft_model(SUPPORTED[family](), BSRConfig(trainable_blocks=[2, 3], reduction_blocks=[1])).eval()
    shape = model.base_model.spec.image_shape
    name = model.base_model.model.main_input_name
    data = [{name: torch.randn(*shape[-len(shape) :])} for _ in range(3)]
    freeze = {"freeze_random": family == "dinov3"}  # its positions are rescaled at random in training
    cache = FeatureCache.build(model, data, tmp_path, dtype=torch.float32, progress=False, **freeze)
    with cache.read_by(model), torch.no_grad():
        batch, images = next(iter(DataLoader(cache, 3))), next(iter(DataLoader(data, 3)))
        for a, b in zip(model(**batch).to_tuple(), model(**images).to_tuple(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_half_the_disk(tmp_path, dtype):
    model = vit(reduction_blocks=[0])
    cache = FeatureCache.build(model, DATA, tmp_path, dtype=dtype, progress=False)
    item = cache[3]
    assert item["cached_tokens"].dtype == dtype and item["labels"] == DATA[3]["labels"]
    assert (tmp_path / "cached_tokens.bin").stat().st_size == len(DATA) * item["cached_tokens"].numel() * 2
    with cache.read_by(model):
        batch = next(iter(DataLoader(cache, 8)))
        images = next(iter(DataLoader(DATA, 8)))
        torch.testing.assert_close(model(**batch).logits, model(**images).logits, atol=0.02, rtol=0.02)


def test_gradient_checkpointing_and_the_trainer(tmp_path):
    model = vit(reduction_blocks=[1], saved_activations="int8")
    cache = FeatureCache.build(model, DATA, tmp_path / "cache", progress=False)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=8,
        report_to="none",
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=2,
        gradient_checkpointing=True,
        disable_tqdm=True,
        dataloader_num_workers=1,
        save_strategy="no",
        use_cpu=True,
    )
    with cache.read_by(model):
        trainer = Trainer(model=model, args=arguments, train_dataset=cache, eval_dataset=DATA)
        trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and losses[1] != losses[0]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    class Broken(Blobs):
        broken = True

        def __getitem__(self, index):
            if self.broken and index == 13:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    model, data = vit(), Broken(21, seed=0)
    monkeypatch.setattr(cache_files, "_FLUSH_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(model, data, tmp_path, batch_size=4, progress=False)
    with pytest.raises(FeatureCacheError, match="holds 12 of 21 samples: its build was interrupted"):
        FeatureCache.open(tmp_path)
    data.broken = False
    seen = []
    monkeypatch.setattr(Broken, "__getitem__", lambda self, i: seen.append(i) or Blobs.__getitem__(self, i))
    cache = FeatureCache.build(model, data, tmp_path, batch_size=4, progress=False)
    assert not set(range(11)) & (set(seen) - set(range(11, -1, -1))) and set(range(12, 21)) <= set(seen)
    whole = FeatureCache.build(model, DATA, tmp_path / "other", progress=False)
    assert all(torch.equal(cache[i]["cached_tokens"], whole[i]["cached_tokens"]) for i in range(21))
    assert len(FeatureCache.open(tmp_path)) == 21


def test_disk_use_is_said_before_it_starts(tmp_path, capsys, monkeypatch):
    FeatureCache.build(vit(), DATA, tmp_path / "a")
    assert "Feature cache: 21 samples of 1 KiB, 0.00 GiB in all, to" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(FeatureCacheError, match=r"needs 0.00 GiB for 21 samples, but .* has 0.00 GiB free"):
        FeatureCache.build(vit(), DATA, tmp_path / "b", progress=False)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".lock"]


def test_a_cache_of_something_else_is_refused(tmp_path):
    model = vit(reduction_blocks=[1])
    cache = FeatureCache.build(model, DATA, tmp_path, progress=False)
    for other, word in (
        (vit(reduction_blocks=[1], trainable_blocks=[3]), "first_trained_block"),
        (vit(reduction_blocks=[1], keep_rate=0.7), "reductions"),
        (vit(reduction_blocks=[1], mode="full_view"), "mode"),
    ):
        with pytest.raises(FeatureCacheError, match=f"belongs to something else: .*{word} is "), cache.read_by(other):
            pass
    changed = vit(reduction_blocks=[1])
    with torch.no_grad():
        changed.base_model.model.vit.layers[0].attention.q_proj.weight[0, 0] += 1e-3
    with pytest.raises(FeatureCacheError, match="leading_weights is "):
        FeatureCache.build(changed, DATA, tmp_path, progress=False)
    for config, word in (
        ({"num_attention_heads": 4}, "model_heads is 4, in the cache 2"),
        ({"layer_norm_eps": 1e-5}, "model_eps"),
    ):
        with pytest.raises(FeatureCacheError, match=word), cache.read_by(vit(reduction_blocks=[1], config=config)):
            pass  # the weights are the same
    with pytest.raises(FeatureCacheError, match="sample 0 is not the one"):
        FeatureCache.build(model, Blobs(21, seed=5), tmp_path, progress=False)
    with pytest.raises(FeatureCacheError, match="num_samples is 20, in the cache 21"):
        FeatureCache.build(model, Blobs(20, seed=0), tmp_path, progress=False)
    with pytest.raises(FeatureCacheError, match="dtype is 'float16', in the cache 'bfloat16'"):
        FeatureCache.build(model, DATA, tmp_path, dtype=torch.float16, progress=False)
    # what trains may change, and what comes after may be another
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    for other in (model, vit(reduction_blocks=[1, 3]), vit(reduction_blocks=[1], trainable="lora")):
        with cache.read_by(other):
            pass


def test_augmentation_is_refused(tmp_path):
    class Noisy(Blobs):
        counter = itertools.count()

        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "pixel_values": item["pixel_values"] + next(self.counter)}

    with pytest.raises(FeatureCacheError, match="was different when it was read again: random augmentation"):
        FeatureCache.build(vit(), Noisy(4, seed=0), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_wrong_states_are_refused_in_words(tmp_path):
    model = vit()
    with pytest.raises(FeatureCacheError, match="there is no feature cache in"):
        FeatureCache.open(tmp_path / "nothing")
    with pytest.raises(FeatureCacheError, match="has no adapter of peft_bsr"):
        FeatureCache.build(model.unload(), DATA, tmp_path, progress=False)
    with pytest.raises(FeatureCacheError, match=r"`dtype=torch.int8` and 21 samples"):
        FeatureCache.build(vit(), DATA, tmp_path, dtype=torch.int8, progress=False)
    model = vit()
    cache = FeatureCache.build(model, DATA, tmp_path, progress=False)
    batch = next(iter(DataLoader(cache, 2)))
    with cache.read_by(model):
        model.add_adapter("second", BSRConfig(trainable_blocks=[1]))
        model.set_adapter("second")
        with pytest.raises(FeatureCacheError, match="the adapter of the cache is not active"):
            model(**batch)
        model.set_adapter("default")
        assert model(**batch).logits.shape == (2, 3)
        with model.disable_adapter(), pytest.raises(FeatureCacheError, match="the adapter is disabled"):
            FeatureCache.build(model, DATA, tmp_path, progress=False)
    about = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**about, "num_rows": 10**6}))
    with pytest.raises(FeatureCacheError, match=r"is damaged \(.* has .* bytes instead of"):
        FeatureCache.open(tmp_path)


def test_it_is_pickled_by_name_not_by_content(tmp_path):
    cache = FeatureCache.build(vit(), DATA, tmp_path, progress=False)
    text = pickle.dumps(cache)
    assert len(text) < 1000
    assert torch.equal(pickle.loads(text)[5]["cached_tokens"], cache[5]["cached_tokens"])


def test_a_failed_forward_leaves_nothing_behind(tmp_path):
    model = vit()
    cache = FeatureCache.build(model, DATA, tmp_path, progress=False)
    images, batch = next(iter(DataLoader(DATA, 2))), next(iter(DataLoader(cache, 2)))
    expected = model(**images).logits
    with cache.read_by(model):
        with pytest.raises(ValueError, match="batch_size"):
            model(**{**batch, "labels": torch.zeros(5, dtype=torch.long)})
        assert torch.equal(model(**images).logits, expected)
        model(**batch)
