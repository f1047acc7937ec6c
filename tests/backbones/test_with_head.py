"""`with_head`: a classifier on a model that has none trains, saves, loads, exports and answers like any other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import get_peft_model
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil

import peft_bsr
from peft_bsr import BSRConfig, ConfigError, FeatureCache, SynQTConfig, UnsupportedModelError, with_head

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

from families import SUPPORTED, TEXT, VIT, run_batch

from peft_bsr.backbones.pooling import FAMILY_POOLS

transformers.logging.set_verbosity_error()
POOLED = {  # family -> its pool, and whether the classifier reads the class token and the patches
    "dinov3": ("class+mean", (0,), True),
    "aimv2": ("attention", (), True),
    "radio": ("class", (0, 1), False),
    "siglip_pooling": ("attention", (), True),
    "siglip2_pooling": ("attention", (), True),
    "pixio": ("class", (0, 1, 2), False),
    "mlcd": ("class", (0,), False),
    "internvl": ("mean", (), True),
    "blip": ("class", (0,), False),
    "vit_mae": ("mean", (), True),
    "owlvit": ("class", (0,), False),
}
QUICK = {"siglip2_pooling", "internvl", "blip", "vit_mae"}
WHOLE = ["dinov3", "aimv2", "radio", "siglip_pooling"]
LABELS = ["cat", "dog", "owl"]
FRESH = """
import json, sys
import torch
import peft_bsr
from transformers import AutoModelForImageClassification

images = torch.load(sys.argv[1] + "/images.pt")
with torch.no_grad():
    for family in sys.argv[2:]:
        loaded = peft_bsr.load(f"{sys.argv[1]}/{family}/adapter")
        whole = AutoModelForImageClassification.from_pretrained(f"{sys.argv[1]}/{family}/whole").eval()
        print(json.dumps([loaded(pixel_values=images).logits.tolist(), whole(pixel_values=images).logits.tolist()]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps of training for each family, what it says, and what another process says of its files."""
    root = tmp_path_factory.mktemp("heads")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    images = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.save(images, root / "images.pt")
    found = {}
    for family in WHOLE:
        folder = root / family
        SUPPORTED[family]().save_pretrained(folder / "base")
        processor.save_pretrained(folder / "base")
        base = type(SUPPORTED[family]()).from_pretrained(folder / "base")
        model = get_peft_model(with_head(base, 3, labels=LABELS), BSRConfig(trainable_blocks=[1, 3])).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(pixel_values=images, labels=torch.tensor([0, 2])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(folder / "adapter")
        with torch.no_grad():
            logits = model(pixel_values=images).logits
            answers = peft_bsr.predict(model, pictures, top_k=None)
            whole = model.unload()
            whole.save_pretrained(folder / "whole")
            found[family] = {"logits": logits, "answers": answers, "folder": folder, "pictures": pictures}
            found[family]["whole"] = whole(pixel_values=images).logits
    said = subprocess.run([sys.executable, "-c", FRESH, str(root), *WHOLE], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
    lines = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("[")]
    for family, (adapted, whole) in zip(WHOLE, lines, strict=True):
        found[family]["fresh"], found[family]["fresh_whole"] = torch.tensor(adapted), torch.tensor(whole)
    return found


@pytest.mark.parametrize("family", WHOLE)
def test_saved_loaded_exported_and_asked_it_says_the_same(runs, family):
    run = runs[family]
    torch.testing.assert_close(run["fresh"], run["logits"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(run["fresh_whole"], run["whole"], atol=1e-6, rtol=1e-5)
    assert_says(run["answers"], run["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE)
def test_onnx_says_the_same(runs, family):
    run = runs[family]
    path = run["folder"] / "model.onnx"
    peft_bsr.export(peft_bsr.load(run["folder"] / "adapter"), "onnx", path, check=False)
    assert_says(peft_bsr.predict(str(path), run["pictures"], top_k=None), run["logits"])


def assert_says(answers, logits):
    for row, answer in zip(logits.softmax(-1), answers, strict=True):
        said = dict(zip(answer.labels, answer.probabilities, strict=True))
        assert [said[label] for label in LABELS] == pytest.approx(row.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in POOLED]
)
def test_each_family_reads_what_it_was_made_for(family):
    pool, reads_prefix, reads_patches = POOLED[family]
    base = SUPPORTED[family]()
    weights = [p.clone() for p in base.parameters()]
    model = with_head(base, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.backbone.parameters(), strict=True))
    assert model.config.pool == pool
    spec = peft_bsr.probe_model(model)
    assert (spec.reads_prefix, spec.reads_patches, spec.num_prefix) == (
        reads_prefix,
        reads_patches,
        model.config.num_prefix,
    )
    assert "classifier" in spec.head
    batch = run_batch(base)
    assert torch.equal(model(**batch).logits, model(**batch).logits), "a masked autoencoder shuffles nothing"
    loss = model(**batch, labels=torch.tensor([0, 2])).loss
    expected = torch.nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 2]))
    torch.testing.assert_close(loss, expected)


def test_patches_that_no_convolution_makes_have_a_grid():
    spec = peft_bsr.probe_model(SUPPORTED["radio"]())
    assert (spec.grid, spec.patch_size) == ((4, 4), (8, 8))


def test_the_guide_gives_each_familys_reason():
    text = (Path(__file__).parents[2] / "docs/guides/with_head.md").read_text()
    rows = {tuple(cell.strip() for cell in line.split("|")[2:4]) for line in text.splitlines() if line.startswith("|")}
    assert {(family.pool, family.why) for family in FAMILY_POOLS.values()} <= rows


def test_pools_are_what_they_say(images):
    base = SUPPORTED["dinov3"]()
    tokens = base(images).last_hidden_state
    expected = {"class": tokens[:, 0], "mean": tokens[:, 3:].mean(1)}
    expected["class+mean"] = torch.cat([expected["class"], expected["mean"]], dim=-1)
    for pool, pooled in expected.items():
        model = with_head(base, 3, pool=pool)
        torch.testing.assert_close(model(images).logits, model.classifier(pooled))
    attention = with_head(base, 3, pool="attention").pool.attention
    heads = [linear(tokens[:, 3:]).unflatten(-1, (4, 8)) for linear in (attention.key, attention.value)]
    query = attention.query.unflatten(-1, (4, 8)).expand(2, -1, -1, -1)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, heads[0]).div(8**0.5).softmax(-1)
    pooled = attention.out(torch.einsum("bhqk,bkhd->bqhd", weights, heads[1]).flatten(1))
    torch.testing.assert_close(attention(tokens[:, 3:]), pooled)


def test_padding_is_not_averaged():
    base = SUPPORTED["siglip2_pooling"]()
    model = with_head(base, 3, pool="mean")
    batch = run_batch(base)
    tokens = base(**batch).last_hidden_state
    expected = torch.stack([tokens[0].mean(0), tokens[1, :12].mean(0)])
    torch.testing.assert_close(model(**batch).logits, model.classifier(expected))


def test_settings_come_back(tmp_path, images):
    """Another pool, several labels: from the folder of the headless model, and from the adapter."""
    SUPPORTED["dinov3"]().save_pretrained(tmp_path / "base")
    kind = type(with_head(SUPPORTED["dinov3"](), 1))
    base = kind.from_pretrained(
        tmp_path / "base", pool="class", num_labels=4, problem_type="multi_label_classification"
    )
    assert base.config.backbone_config is base.backbone.config
    assert base.backbone.config._attn_implementation == "sdpa"
    model = get_peft_model(base, BSRConfig(init_weights=False)).eval()
    assert model.base_model.plan().mode == "compact"
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_bsr.load(tmp_path / "adapter")
    assert (loaded.config.pool, loaded.config.problem_type) == ("class", "multi_label_classification")
    torch.testing.assert_close(loaded(pixel_values=images).logits, model(pixel_values=images).logits)
    assert loaded(pixel_values=images, labels=torch.ones(2, 4)).loss.ndim == 0
    base.save_pretrained(tmp_path / "whole")
    assert AutoConfig.from_pretrained(tmp_path / "whole").pool == "class"
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    assert again.backbone.config._attn_implementation == "eager"


@pytest.mark.slow
@pytest.mark.parametrize("config", [SynQTConfig(), BSRConfig(tasks={"a": 2, "b": 5})], ids=["synqt", "tasks"])
def test_other_methods_take_the_classifiers_place(config, images):
    model = get_peft_model(with_head(SUPPORTED["dinov3"](), 3), config).train()
    if config.peft_type == "BSR":
        out = model(pixel_values=images, task="b", labels=torch.tensor([0, 4]))
        assert out.logits.shape == (2, 5)
    else:
        out = model(pixel_values=images, labels=torch.tensor([0, 2]))
    out.loss.backward()


def rescaled(**changes):
    """DINOv3, which rescales its positions at random in training."""
    return with_head(SUPPORTED["dinov3"](pos_embed_rescale=4.0, **changes), 3)


def test_positions_are_drawn_once_for_frozen_and_trained_blocks(images):
    """Frozen leading blocks are in evaluation mode, but get the training forward's own positions: those of stock."""
    stock, model = rescaled().train(), rescaled()
    model.load_state_dict(stock.state_dict())
    model = get_peft_model(model, BSRConfig(trainable_blocks=[2, 3], keep_rate=1.0)).train()
    outputs = []
    for one in (stock, model):
        torch.manual_seed(7)
        outputs.append(one(pixel_values=images).logits)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-5)
    torch.manual_seed(8)
    assert not torch.allclose(model(pixel_values=images).logits, outputs[1], atol=1e-4), "nothing was drawn"


def test_cached_tokens_and_trained_blocks_have_the_same_positions(images, tmp_path):
    model = get_peft_model(rescaled(), BSRConfig(trainable_blocks=[2, 3])).train()
    data = [{"pixel_values": image} for image in images]
    cache = FeatureCache.build(
        model, data, tmp_path, dtype=torch.float32, progress=False, freeze_random=True, batch_size=2
    )
    assert cache.drawing == "backbone.rope_embeddings"
    batch = torch.utils.data.default_collate([cache[0], cache[1]])
    with cache.read_by(model):
        found = [model(**batch).logits for seed in (0, 1) if torch.manual_seed(seed)]
    modes = {module.training for module in model.base_model.model.backbone.rope_embeddings.modules()}
    assert modes == {True}
    expected = model.eval()(pixel_values=images).logits
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_is_refused():
    base = SUPPORTED["aimv2"]()
    with pytest.raises(ConfigError, match=r"`num_labels=0`[^\n]*\n.*`pool='max'`[^\n]*\n.*`labels=\['a'\]`") as error:
        with_head(base, 0, pool="max", labels=["a"], problem_type="x", dropout=2)
    assert len(str(error.value).splitlines()) == 6
    with pytest.raises(ConfigError, match=r"aimv2_vision_model has no class token\. Use 'mean' or 'attention'"):
        with_head(base, 3, pool="class+mean")
    with pytest.raises(UnsupportedModelError, match="needs a Dinov2Model, which has no head, not a Dinov2ForImage"):
        with_head(SUPPORTED["dinov2"](), 3)
    with pytest.raises(UnsupportedModelError, match="not Linear"):
        with_head(torch.nn.Linear(2, 2), 3)
    swin = transformers.SwinModel(transformers.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 1]))
    with pytest.raises(UnsupportedModelError, match="is not a plain vision transformer"):
        with_head(swin, 3)


OTHERS = {  # models that are not one vision model, and what is said of them
    "CLIPModel takes `input_ids`. Give the vision model inside: `with_head(model.vision_model, ...)`.": lambda: (
        transformers.CLIPModel(transformers.CLIPConfig(vision_config=VIT, text_config=TEXT))
    ),
    "BertModel takes `input_ids` and no images.": lambda: transformers.BertModel(
        transformers.BertConfig(vocab_size=50, **TEXT)
    ),
    "VideoMAEModel takes `pixel_values` of shape (16, 3, 32, 32) instead of images.": lambda: (
        transformers.VideoMAEModel(transformers.VideoMAEConfig(**VIT))
    ),
    "YolosModel has tokens after the patches (`num_detection_tokens=5`)": lambda: transformers.YolosModel(
        transformers.YolosConfig(**{**VIT, "image_size": [32, 32]}, num_detection_tokens=5)
    ),
    "ResNetModel: its config has no `image_size`": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_is_no_vision_model_is_named(message):
    with pytest.raises(UnsupportedModelError) as caught:
        with_head(OTHERS[message](), 3)
    assert message in str(caught.value)


def test_a_larger_models_folder_is_refused(tmp_path):
    config = transformers.BlipConfig(vision_config=VIT, text_config=TEXT)
    with torch.device("cpu"):
        transformers.BlipModel(config).save_pretrained(tmp_path)
    kind = type(with_head(SUPPORTED["blip"](), 1))
    with pytest.raises(UnsupportedModelError, match=r"Most weights of .* are missing in .* `with_head`"):
        kind.from_pretrained(tmp_path, num_labels=3)


def test_a_configuration_without_a_bare_vision_model_is_refused_by_name(tmp_path):
    transformers.FlavaImageConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    kind = type(with_head(SUPPORTED["aimv2"](), 1))
    with pytest.raises(UnsupportedModelError, match=r"no vision model without a head for 'flava_image_model'"):
        kind.from_pretrained(tmp_path, num_labels=3)
    with pytest.raises(UnsupportedModelError, match=r"no vision model without a head for 'flava_image_model'"):
        kind(kind.config_class(transformers.FlavaImageConfig()))


def test_a_bare_model_is_found_before_its_file_is_imported():
    code = "import transformers; from peft_bsr.compat.transformers_api import backbone_class_of as found; "
    code += "print(found(transformers.AltCLIPVisionConfig()).__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split()[-1:] == ["AltCLIPVisionModel"], ran.stderr
