"""An adapter of a resized base model: the size comes back with it, by itself, and so does every output."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import peft_bsr
from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, SynQTConfig
from peft_bsr.backbones import native_size
from peft_bsr.exporting.prepare import to_image_function
from peft_bsr.hub import find_image_processor
from tests.conftest import SIZES, TEXT

pytestmark = pytest.mark.sampled(2)

CONFIGS = {
    "bsr": BSRConfig(init_weights=False),
    "alast": ALaSTConfig(train_embeddings=True),
    "synqt": SynQTConfig(),
    "saved": BSRConfig(trainable_blocks="every:1", reduction_blocks=[], modules_to_save=["vit.embeddings"]),
}


def siglip():
    """A head of 3 classes on SigLIP's vision model."""
    return SiglipForImageClassification(SiglipConfig(vision_config=SIZES, text_config=TEXT, num_labels=3))


def logits(model, images, **arguments):
    with torch.no_grad():
        return model(pixel_values=images, **arguments).logits


def train_a_step(model, images):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("family", ["vit", "deit", "clip", "siglip"])
def test_a_base_is_resized_again_when_its_adapter_is_loaded(family, make_model, tmp_path):
    torch.manual_seed(0)
    stock = siglip() if family == "siglip" else make_model(family)
    for name, parameter in stock.named_parameters():
        if "position_embedding" in name:
            torch.nn.init.normal_(parameter)
    stock.eval().save_pretrained(tmp_path / "base")
    images = torch.randn(2, 3, 64, 64)
    model = type(stock).from_pretrained(tmp_path / "base")
    peft_bsr.set_image_size(model, 64)
    model = train_a_step(get_peft_model(model, BSRConfig()), images)
    model.save_pretrained(tmp_path / "adapter")
    changed = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_config"]
    inner = family in ("clip", "siglip")
    assert changed.pop("problem_type") == "single_label_classification"
    assert changed == ({"vision_config": {"image_size": 64}} if inner else {"image_size": 64})
    loaded = peft_bsr.load(tmp_path / "adapter")
    assert native_size(loaded.config) == (64, 64)
    assert torch.equal(logits(loaded, images), logits(model, images))
    with model.disable_adapter():  # whose head is the base model's still
        assert torch.equal(logits(model, images), logits(stock, images, interpolate_pos_encoding=True))
    by_peft = PeftModel.from_pretrained(type(stock).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits(by_peft, images, interpolate_pos_encoding=True), logits(model, images))


@pytest.mark.parametrize("name", CONFIGS)
def test_methods_with_and_without_the_table_among_their_weights(name, base, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    model = ViTForImageClassification.from_pretrained(base)
    peft_bsr.set_image_size(model, 64)
    model = train_a_step(get_peft_model(model, CONFIGS[name]), images)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_bsr.load(tmp_path / "adapter")
    assert torch.equal(logits(loaded, images), logits(model, images))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(peft_bsr.load(tmp_path / "again"), images), logits(model, images))


def test_positions_of_another_size_are_made_of_the_base_models(base, make_adapter, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    images = torch.randn(2, 3, 48, 48)
    native = peft_bsr.load(tmp_path / "adapter")
    other = peft_bsr.load(tmp_path / "adapter", image_size=48)
    assert torch.equal(logits(other, images), logits(native, images, interpolate_pos_encoding=True))
    with pytest.raises(ConfigError, match="Use 48 or 56"):
        peft_bsr.load(tmp_path / "adapter", image_size=50)


def test_the_base_models_image_processor_is_for_the_size_of_the_model(base, tmp_path):
    model = ViTForImageClassification.from_pretrained(base)
    peft_bsr.set_image_size(model, 64)
    get_peft_model(model, BSRConfig()).save_pretrained(tmp_path / "adapter")
    assert peft_bsr.load_image_processor(tmp_path / "adapter").size == {"height": 64, "width": 64}, "the base's is 32"
    found, origin = find_image_processor(peft_bsr.load(tmp_path / "adapter", image_size=48))
    assert found.size == {"height": 48, "width": 48}
    assert origin == f"the base model's own: {base}"
    cropping = {"size": {"shortest_edge": 72}, "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
    ViTImageProcessorPil(**cropping).save_pretrained(tmp_path / "adapter")
    assert peft_bsr.load_image_processor(tmp_path / "adapter").do_center_crop, "it fits as it is"


def test_a_merged_model_is_one_of_that_size(base, tmp_path):
    model = ViTForImageClassification.from_pretrained(base)
    peft_bsr.set_image_size(model, 64)
    config = BSRConfig(reduction_blocks=[], mode=None, trainable_blocks="every:1", init_weights=False)
    model = get_peft_model(model, config).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = logits(model, images)
    model.merge_and_unload().save_pretrained(tmp_path / "plain")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert torch.allclose(logits(plain, images), expected, atol=1e-5)
    adapted = get_peft_model(plain, BSRConfig())  # its own size now
    adapted.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_config"] is None


def test_export_resizes_a_copy(make_adapter):
    model, images = make_adapter(), torch.randn(2, 3, 64, 64)
    function = to_image_function(model, image_size=64)
    with torch.no_grad():
        (found,) = function(images)
    assert torch.allclose(found, logits(model, images, interpolate_pos_encoding=True), atol=1e-5)
    assert native_size(model.config) == (32, 32)
