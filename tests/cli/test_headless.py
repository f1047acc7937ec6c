"""A model without a classifier on the command line: it gets one, and one line says so."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import DINOv3ViTConfig, DINOv3ViTModel, ViTImageProcessorPil

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TINY |= {"image_size": 32, "patch_size": 8}
FAMILIES = {  # class of the model without a head -> what its new classifier reads
    "DINOv3ViT": "the class token and the mean of the patches",
    "Aimv2Vision": "an attention pool over the patches",
    "Radio": "the class token",
    "SiglipVision": "an attention pool over the patches",
}
TOLD = [*("--mean", *[0.5] * 3), *("--std", *[0.5] * 3)]  # where transformers has no processor without torchvision
FRESH = """
import json, sys
import peft_bsr

model = peft_bsr.load(sys.argv[1])
answers = peft_bsr.predict(model, sys.argv[2], top_k=None)
print(json.dumps([[one.file, dict(zip(one.labels, one.probabilities))] for one in answers]))
"""


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dinov3"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_processor_type"] = "DINOv3ViTImageProcessor"  # which needs torchvision
    settings["image_mean"] = [0.1, 0.2, 0.3]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_it_is_trained_evaluated_and_asked(headless, images, run, run_json, tmp_path):
    output = tmp_path / "out"
    command = ["train", "--model", headless, "--dataset", images, "--output", output, "--max-steps", "2", "--cache"]
    code, _, said = run(*command, "--batch-size", "4", "--set", "trainable_blocks=last:1", "--no-measuring")
    assert code == 0, said
    assert f"{headless} has no head: a new classifier reads the class token and the mean of the patches (as its" in said
    assert "cache: `backbone.rope_embeddings` is random in training, but not with a cache" in said
    adapter = output / "adapter"
    assert json.loads((adapter / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    assert "image-classification" in (adapter / "README.md").read_text()
    scores = json.loads((output / "scores.json").read_text())["test"]
    found = run_json("evaluate", adapter, "--dataset", images, "--split", "test")
    assert found["loss"] == pytest.approx(scores["loss"], abs=1e-5)
    code, _, said = run("merge", adapter, "--output", tmp_path / "merged")
    assert code == 0 and "read it by transformers after `import peft_bsr`" in said
    facts = run_json("inspect", adapter)
    assert facts["class"] == "BackboneForImageClassification"
    assert facts["adapter"]["labels"] == ["dark", "light"]


@pytest.mark.parametrize(
    "family", [name if name == "Aimv2Vision" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_adapter_fresh_process_and_onnx_file_say_the_same(family, images, run, run_json, tmp_path):
    """As a newcomer has it: a folder with weights and nothing else, then one command after the other."""
    base, adapter, file = tmp_path / "base", tmp_path / "out" / "adapter", tmp_path / "model.onnx"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY)
    getattr(transformers, f"{family}Model")(config).save_pretrained(base)
    command = ["train", "--model", base, "--dataset", images, "--output", tmp_path / "out", "--no-measuring"]
    plan = ["--set", "trainable_blocks=last:1", "--set", "reduction_blocks=[0]"]  # half of the patches go
    command += TOLD if family in ("DINOv3ViT", "Radio") else []
    code, _, said = run(*command, *plan, "--max-steps", "2", "--batch-size", "4", "--learning-rate", "0.01")
    assert code == 0, said
    assert f"{base} has no head: a new classifier reads {FAMILIES[family]} (" in said
    run_json("export", adapter, "--output", file, "--no-check")  # the check is what follows
    found = [
        [[one["file"], dict(zip(one["labels"], one["probabilities"], strict=True))] for one in answers]
        for answers in (run_json("predict", images, "--model", m, "--all")["predictions"] for m in (adapter, file))
    ]
    fresh = subprocess.run([sys.executable, "-c", FRESH, str(adapter), str(images)], capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    found.append(json.loads(fresh.stdout.splitlines()[-1]))
    assert len(found[0]) == 20
    for other in found[1:]:
        assert [name for name, _ in other] == [name for name, _ in found[0]]
        for (_, chances), (_, expected) in zip(other, found[0], strict=True):
            assert chances == pytest.approx(expected, abs=1e-5)
