"""`peft_bsr.predict`: what it takes, what it answers for each kind of problem, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

import peft_bsr
from peft_bsr import BSRConfig, DatasetError, HubError, InputError, UnreadableImageWarning
from peft_bsr.prediction import Predictor, open_predictor
from peft_bsr.prediction.images import outputs_of, read_rows

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture
def make_adapter(tmp_path: Path):
    """`make_adapter(num_labels=3)`: folder of an adapter, its processor beside it."""

    def make(**settings) -> Path:
        torch.manual_seed(0)
        base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, initializer_range=0.3))
        base.save_pretrained(tmp_path / "base")
        changed = ViTForImageClassification.from_pretrained(tmp_path / "base", ignore_mismatched_sizes=True, **settings)
        get_peft_model(changed, BSRConfig(trainable_blocks=[1])).save_pretrained(tmp_path / "adapter")
        PROCESSOR.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


@pytest.fixture
def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (20, 30 + i, 3), dtype=np.uint8)) for i in range(3)]


def logits_of(model, pictures) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**PROCESSOR(pictures, return_tensors="pt")).logits


def test_paths_pictures_and_folders_are_the_same(make_adapter, pictures, tmp_path):
    adapter = make_adapter(num_labels=3)
    folder = tmp_path / "photos" / "inner"
    folder.mkdir(parents=True)
    files = [folder / f"{index}.png" for index in range(3)]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    by_folder = peft_bsr.predict(adapter, folder.parent, top_k=None)
    assert [one.file for one in by_folder] == [str(file) for file in files]
    assert [one.labels for one in peft_bsr.predict(str(adapter), files, top_k=None, batch_size=2)] == [
        one.labels for one in by_folder
    ]
    model = peft_bsr.load(adapter)
    in_memory = peft_bsr.predict(model, [files[0], *pictures[1:]], top_k=None)
    assert [one.file for one in in_memory] == [str(files[0]), "row 1", "row 2"]
    expected = logits_of(model, pictures).softmax(-1)
    for one, other, chances in zip(by_folder, in_memory, expected, strict=True):
        assert one.labels == other.labels
        assert one.label == model.config.id2label[int(chances.argmax())]
        assert one.probability == pytest.approx(float(chances.max()), abs=1e-6)
        assert [chances[c] for c in one.classes] == pytest.approx(list(one.probabilities), abs=1e-6)
    (best,) = peft_bsr.predict(model, files[0])
    assert (best.labels, best.classes) == (by_folder[0].labels[:1], by_folder[0].classes[:1])


def test_several_labels(make_adapter, pictures):
    adapter = make_adapter(num_labels=4, problem_type="multi_label_classification")
    chances = logits_of(peft_bsr.load(adapter), pictures).sigmoid()
    found = peft_bsr.predict(adapter, pictures, threshold=0.4)
    assert [set(one.classes) for one in found] == [set(np.flatnonzero(row >= 0.4)) for row in chances]
    assert 0 < sum(len(one.labels) for one in found) < chances.numel(), "else the threshold is not seen"
    (everything, *_) = peft_bsr.predict(adapter, pictures, top_k=None)
    assert sorted(everything.classes) == [0, 1, 2, 3]
    assert list(everything.probabilities) == sorted(everything.probabilities, reverse=True)


def test_values(make_adapter, pictures):
    adapter = make_adapter(num_labels=1)
    found = peft_bsr.predict(adapter, pictures)
    assert [one.values[0] for one in found] == pytest.approx(
        logits_of(peft_bsr.load(adapter), pictures)[:, 0].tolist(), abs=1e-6
    )
    assert all(one.probabilities == () and one.label is None for one in found)


def test_what_cannot_be_read_is_told(make_adapter, pictures, tmp_path):
    adapter = make_adapter(num_labels=3)
    (tmp_path / "bad.jpg").write_text("no image")
    pictures[0].save(tmp_path / "good.png")
    with pytest.warns(UnreadableImageWarning, match=r"1 of 2 images cannot be read: .*bad.jpg \(is not an image\)"):
        bad, good = peft_bsr.predict(adapter, [tmp_path / "bad.jpg", tmp_path / "good.png"])
    assert (bad.error, bad.labels, bad.probability) == ("is not an image", (), None)
    assert good.error is None and good.label is not None
    with pytest.raises(DatasetError, match=r"None of the 1 images can be read: .*bad\.jpg"):
        peft_bsr.predict(adapter, tmp_path / "bad.jpg")


def test_a_predictor_of_one_batch_size_gets_it(pictures):
    seen = []

    def run(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.shape)
        return pixels.mean((2, 3))

    predictor = Predictor("fixed", ["r", "g", "b"], "single_label_classification", PROCESSOR, run, batch_size=2)
    found = list(outputs_of(predictor, read_rows(pictures), progress=False))
    assert seen == [(2, 3, 32, 32)] * 2
    expected = PROCESSOR(pictures, return_tensors="pt")["pixel_values"].mean((2, 3))
    assert torch.equal(torch.stack(found), expected)


def test_a_plain_model_is_left_as_it_was(pictures):
    model = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8)).train()
    with pytest.raises(InputError, match="has no image processor"):
        peft_bsr.predict(model, pictures)
    (one, *_) = peft_bsr.predict(model, pictures, image_processor=PROCESSOR)
    assert model.training
    assert one.probability == pytest.approx(float(logits_of(model, pictures)[0].softmax(-1).max()), abs=1e-6)


def test_models_that_predict_nothing(pictures, tmp_path):
    ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)).save_pretrained(tmp_path / "bare")
    PROCESSOR.save_pretrained(tmp_path / "bare")
    with pytest.raises(HubError, match=r"lacks weights .* such as classifier\.bias: it was not trained"):
        open_predictor(tmp_path / "bare")
    base = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8))
    tasks = get_peft_model(base, BSRConfig(tasks={"a": 2, "b": 3}))
    with pytest.raises(HubError, match=r"does not predict classes or values of images\. Several tasks"):
        peft_bsr.predict(tasks, pictures, image_processor=PROCESSOR)
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(HubError, match="cannot be read by onnxruntime"):
        open_predictor(tmp_path / "broken.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "the list is empty"),
        ({"images": "nowhere.png"}, "there is no file `nowhere.png`"),
        ({"top_k": 0}, "`top_k=0` must be at least 1"),
        ({"device": "cpu"}, "a model in memory stays on its device"),
    ],
)
def test_refusals(pictures, arguments, message):
    model = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8))
    with pytest.raises((DatasetError, InputError), match=message):
        peft_bsr.predict(model, **({"images": pictures, "image_processor": PROCESSOR} | arguments))
