"""Upload to and download from a stand-in of the Hub, in a process of its own: HF_ENDPOINT is read once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

SPEC = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
stand_in = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(stand_in)

SCRIPT = """
import sys, torch
import peft_bsr
from peft import get_peft_model
from peft_bsr.hub import find_image_processor
from transformers import AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

base, cache = sys.argv[1:]
labels = {0: "cat", 1: "dog", 2: "owl", 3: "yak"}
vit = AutoModelForImageClassification.from_pretrained(
    base, id2label=labels, label2id={n: i for i, n in labels.items()}, ignore_mismatched_sizes=True
)
model = get_peft_model(vit, peft_bsr.BSRConfig(init_weights=False)).eval()
peft_bsr.add_facts(model, dataset="user/pets", metrics={"accuracy": 0.75})
processor = ViTImageProcessorPil(size={"height": 48, "width": 48})  # the base model's has 32
url = peft_bsr.push_to_hub(model, "user/pets-bsr", image_processor=processor)
print("url", url)
loaded = peft_bsr.load("user/pets-bsr")
print("found", find_image_processor(loaded)[0].size["height"])
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    print("equal", torch.equal(loaded(images).logits, model(images).logits))
print("labels", sorted(loaded.config.id2label.values()))
print("size", peft_bsr.load_image_processor("user/pets-bsr").size["height"])
peft_bsr.push_to_hub(loaded, "user/again-bsr", revision="v2")
print("again", peft_bsr.load_image_processor("user/again-bsr", revision="v2").size["height"])
peft_bsr.push_to_hub(model, "user/plain-bsr")
print("plain", find_image_processor(peft_bsr.load("user/plain-bsr"))[1])
named = get_peft_model(model.unload(), peft_bsr.BSRConfig(init_weights=False), adapter_name="vision").eval()
named.add_adapter("other", peft_bsr.BSRConfig())
peft_bsr.push_to_hub(named, "user/named-bsr", image_processor=processor)
loaded = peft_bsr.load("user/named-bsr")
with torch.no_grad():
    print("named", torch.equal(loaded(images).logits, named(images).logits))
try:
    peft_bsr.load("user/nothing")
except peft_bsr.HubError as error:
    print("refused", error)
"""


@pytest.fixture
def hub():
    with stand_in.running_hub() as running:
        yield running


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, base, tmp_path):
    by_hand = b"---\nlicense: mit\n---\n\nMy pets.\n"
    hub.repositories["user/pets-bsr"] = {"README.md": by_hand}
    hub.repositories["user/named-bsr"] = {"README.md": b"My model.\n"}
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_test"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", SCRIPT, str(base), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr + "\n".join(hub.log)
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert said["url"] == f"{hub.endpoint}/user/pets-bsr/commit/{stand_in.COMMIT}"
    assert said["equal"] == "True"
    assert said["labels"] == "['cat', 'dog', 'owl', 'yak']"
    assert said["found"] == said["size"] == "48"
    assert said["again"] == "48", "the image processor that it was loaded with"
    assert "v2" in hub.branches
    assert said["plain"] == f"the base model's own: {base}", "the adapter has none"
    assert said["named"] == "True"
    assert "`user/nothing` is not a local folder, and cannot be read from the Hub" in said["refused"]
    files = hub.repositories["user/pets-bsr"]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"} <= set(files)
    assert any(line.startswith("PUT /objects/") for line in hub.log), "weights go by LFS"
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert "My pets." in card.text
    assert "- accuracy on user/pets: 0.75" in card.text
    assert card.data.pipeline_tag == "image-classification"
    named = hub.repositories["user/named-bsr"]
    assert {"preprocessor_config.json", "other/adapter_config.json"} <= set(named)
    assert not any(name.startswith("vision/") for name in named)
    assert "My model." in named["README.md"].decode() and "## What it does" in named["README.md"].decode()
