"""The task of a model: on its card, in its pipeline, after it was loaded."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from PIL import Image
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    BeitConfig,
    BeitForSemanticSegmentation,
    DPTConfig,
    DPTForDepthEstimation,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

import peft_bsr
from peft_bsr import BSRConfig, HubError, SynQTConfig

pytestmark = pytest.mark.sampled(2)

BLOCKS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
IMAGES = {**BLOCKS, "image_size": 32, "patch_size": 8}


def base_of(folder, **settings):
    return ViTForImageClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **settings)


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


MODELS = {
    "audio-classification": lambda: ASTForAudioClassification(ASTConfig(**BLOCKS, max_length=64, num_mel_bins=32)),
    "video-classification": lambda: VideoMAEForVideoClassification(
        VideoMAEConfig(**BLOCKS, image_size=32, patch_size=16, num_frames=4)
    ),
    "depth-estimation": lambda: DPTForDepthEstimation(
        DPTConfig(**IMAGES, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4)
    ),
    "image-segmentation": lambda: BeitForSemanticSegmentation(BeitConfig(**IMAGES, out_indices=[1, 2, 3, 4])),
    "object-detection": lambda: YolosForObjectDetection(
        YolosConfig(**IMAGES | {"image_size": [32, 32]}, num_detection_tokens=3)
    ),
}


@pytest.mark.parametrize("task", MODELS)
def test_a_card_has_the_models_own_task(task, tmp_path):
    get_peft_model(MODELS[task](), BSRConfig(trainable_blocks=[1])).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == task
    assert "image-classification" not in card.content
    assert task.replace("-", " ").capitalize() in card.text


@pytest.mark.parametrize(
    ("settings", "words", "tag"),
    [
        ({"num_labels": 1}, "Image regression, 1 value: ", None),
        ({"num_labels": 3, "problem_type": "regression"}, "Image regression, 3 values: ", None),
        (
            {"num_labels": 5, "problem_type": "multi_label_classification"},
            "Multi-label image classification, 5 labels, each by itself (sigmoid): ",
            "image-classification",
        ),
        ({"id2label": {0: "cat", 1: "dog"}}, "Image classification, 2 classes: cat, dog.", "image-classification"),
    ],
    ids=["one value", "values", "multi-label", "classes"],
)
def test_what_the_labels_mean_is_on_the_card(settings, words, tag, base, tmp_path):
    get_peft_model(base_of(base, **settings), BSRConfig()).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert words in card.text
    assert card.data.pipeline_tag == tag
    assert ("classification" in card.text) == (tag is not None)


def test_what_the_loss_found_out_is_kept(base, images, tmp_path):
    """transformers' losses write `problem_type` in the first step, after the adapter was attached."""
    model = get_peft_model(base_of(base, num_labels=5), BSRConfig())
    model(pixel_values=images, labels=torch.rand(2, 5))
    model.save_pretrained(tmp_path / "adapter")
    assert peft_bsr.load(tmp_path / "adapter").config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("config", [BSRConfig(init_weights=False), SynQTConfig()], ids=["bsr", "synqt"])
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", None])
def test_a_pipeline_answers_as_the_trained_model(problem, config, base, tmp_path):
    model = get_peft_model(base_of(base, num_labels=5, problem_type=problem), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    predict = peft_bsr.pipeline(tmp_path / "adapter")
    pixels = predict.image_processor(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits[0]
    expected = {"regression": logits, None: logits.softmax(-1)}.get(problem, logits.sigmoid())
    scores = {entry["label"]: entry["score"] for entry in predict(picture(), top_k=5)}
    assert [scores[f"LABEL_{i}"] for i in range(5)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_cards_own_code_runs_in_its_folder(base, tmp_path, monkeypatch):
    get_peft_model(base_of(base, id2label={0: "cat", 1: "dog"}), BSRConfig()).save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    picture().save(tmp_path / "adapter" / "image.jpg")
    monkeypatch.chdir(tmp_path / "adapter")
    found: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1] + "\nanswer = predict('image.jpg')", found)
    assert {entry["label"] for entry in found["answer"]} == {"cat", "dog"}
    assert str(tmp_path) not in text


def test_several_tasks_have_no_pipeline(base, tmp_path):
    get_peft_model(base_of(base), BSRConfig(tasks={"a": 2, "b": 3})).save_pretrained(tmp_path / "adapter")
    with pytest.raises(HubError, match=r"no pipeline for .*Several tasks with a head each: a, b\."):
        peft_bsr.pipeline(tmp_path / "adapter")
