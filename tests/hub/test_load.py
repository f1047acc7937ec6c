from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import peft_bsr
from peft_bsr import ALaSTConfig, BSRConfig, HubError, ProcessorWarning, SynQTConfig
from peft_bsr.data import load_processor
from peft_bsr.hub import read_config


def logits(model, images):
    with torch.no_grad():
        return model(pixel_values=images).logits


@pytest.mark.parametrize(
    "config",
    [BSRConfig(init_weights=False), BSRConfig(trainable="lora", init_weights=False), ALaSTConfig(), SynQTConfig()],
    ids=["bsr", "bsr_lora", "alast", "synqt"],
)
def test_one_call_reads_base_adapter_head_and_labels(config, make_adapter, images, tmp_path):
    model = make_adapter(config)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft_bsr.load(tmp_path / "adapter")
    assert type(loaded.get_base_model()).__name__ == "ViTForImageClassification"
    assert loaded.config.id2label == {0: "cat", 1: "dog", 2: "owl", 3: "yak"}
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded, images), logits(model, images)), "the head comes from the adapter"


def test_a_pipeline_says_the_adapters_labels(make_adapter, base, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    model = peft_bsr.load(tmp_path / "adapter")
    processor = peft_bsr.load_image_processor(tmp_path / "adapter")  # the base model's: the adapter has none
    classify = pipeline("image-classification", model=model.get_base_model(), image_processor=processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    answer = classify(image)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    expected = logits(model, pixels).softmax(-1)[0]
    assert {entry["label"] for entry in answer} == {"cat", "dog", "owl", "yak"}
    assert answer[0]["score"] == pytest.approx(float(expected.max()), abs=1e-6)


def test_the_adapters_own_image_processor_comes_first(make_adapter, base, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    processor = peft_bsr.load_image_processor(tmp_path / "adapter")
    processor.size = {"height": 48, "width": 48}
    processor.save_pretrained(tmp_path / "adapter")
    assert peft_bsr.load_image_processor(tmp_path / "adapter").size["height"] == 48
    peft_bsr.load(tmp_path / "adapter").save_pretrained(tmp_path / "again")
    assert peft_bsr.load_image_processor(tmp_path / "again").size["height"] == 48, "it stays with the adapter"


def test_what_to_do_without_an_image_processor(make_adapter, base, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(HubError) as error:
        peft_bsr.load_image_processor(tmp_path / "adapter")
    assert f"nor its base model `{base}` has the image processor that is needed" in str(error.value)
    assert "Save the one of the training in the adapter's folder" in str(error.value)
    with pytest.warns(ProcessorWarning):
        load_processor(str(base)).save_pretrained(tmp_path / "adapter")
    assert peft_bsr.load_image_processor(tmp_path / "adapter").size["height"] == 32


def test_training_goes_on(make_adapter, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    loaded = peft_bsr.load(tmp_path / "adapter", is_trainable=True)
    assert any(p.requires_grad for p in loaded.parameters())


def test_a_base_model_that_moved_is_given(make_adapter, base, images, tmp_path):
    model = make_adapter()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, images)
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(HubError, match=r"base model `.*base` cannot be read .* as `base=`"):
        peft_bsr.load(tmp_path / "adapter")
    assert torch.equal(logits(peft_bsr.load(tmp_path / "adapter", base=tmp_path / "moved"), images), expected)


def test_what_is_no_adapter_is_refused(base):
    with pytest.raises(HubError, match=r"is not an adapter \(.*Give a folder with adapter_config.json"):
        peft_bsr.load(base)


def test_another_base_model_is_refused(make_adapter, make_model, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    make_model("dinov2").save_pretrained(tmp_path / "other")
    with pytest.raises(HubError, match=r"lacks \d+ of the \d+ weights of ViTForImageClassification"):
        peft_bsr.load(tmp_path / "adapter", base=tmp_path / "other")


def test_a_class_outside_of_transformers_is_not_imported(make_adapter, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    make_adapter().save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    written["auto_mapping"] = {"parent_library": "planted", "base_model_class": "Model"}
    path.write_text(json.dumps(written))
    assert type(peft_bsr.load(tmp_path / "adapter").get_base_model()).__name__ == "ViTForImageClassification"
    assert "planted" not in sys.modules


def test_an_adapter_without_a_base_is_refused(make_adapter, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    config = read_config(tmp_path / "adapter")
    config.base_model_name_or_path = None
    with pytest.raises(HubError, match="does not name its base model"):
        peft_bsr.hub.load_base(config)


def test_a_model_without_a_classifier_has_no_labels(make_model):
    from peft import get_peft_model

    assert get_peft_model(make_model("vit_bare"), BSRConfig()).peft_config["default"].labels is None
