"""What is saved is what trained, under the names it had, and two saves are never taken for one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_bsr import AdapterError, AdapterFileError, ALaSTConfig, BSRConfig, ConfigError
from peft_bsr.errors import OtherWeightsWarning
from tests.bad_input.conftest import make_adapter, make_vit, unseal
from tests.tuners.conftest import assert_same_state, state_of

METHODS = ("bsr", "alast", "synqt")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def settings(folder: Path) -> dict:
    return json.loads((folder / CONFIG).read_text())


@pytest.mark.parametrize("method", METHODS)
def test_a_head_replaced_after_attaching_is_not_left_out_silently(method, tmp_path):
    model = make_adapter(method)
    model.base_model.model.classifier = nn.Linear(32, 3)
    with pytest.raises(AdapterError, match="`classifier` was replaced or removed after the adapter was attached"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*")), "nothing was written"


def test_a_trained_module_that_was_taken_out_is_told(tmp_path):
    model = make_adapter("bsr")
    model.base_model.model.vit.layers[3].mlp.fc1 = nn.Linear(32, 64)
    with pytest.raises(AdapterError, match=r"`vit\.layers\.3\.mlp\.fc1` was replaced"):
        model.save_pretrained(tmp_path)


def test_names_of_classes_survive_a_plain_reload(tmp_path):
    base = make_vit()
    base.config.id2label = {0: "cat", 1: "dog", 2: "fox"}
    get_peft_model(base, BSRConfig(trainable_blocks=[3])).save_pretrained(tmp_path / "a")
    PeftModel.from_pretrained(make_vit(), tmp_path / "a").save_pretrained(tmp_path / "b")
    assert settings(tmp_path / "b")["labels"] == ["cat", "dog", "fox"]
    renamed = make_vit()
    renamed.config.id2label = {0: "Katze", 1: "Hund", 2: "Fuchs"}
    PeftModel.from_pretrained(renamed, tmp_path / "b").save_pretrained(tmp_path / "c")
    assert settings(tmp_path / "c")["labels"] == ["Katze", "Hund", "Fuchs"], "the model's own come first"


@pytest.mark.parametrize("config", [BSRConfig(trainable_blocks=[2, 3]), ALaSTConfig()], ids=["bsr", "alast"])
def test_weights_that_trained_blocks_share_are_refused(config):
    model = make_vit()
    model.vit.layers[2].mlp.fc1.weight = model.vit.layers[3].mlp.fc1.weight
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"'vit\.layers\.2\.mlp\.fc1' shares a weight with 'vit\.layers\.3\.mlp\.fc1"):
        get_peft_model(model, config)
    assert_same_state(model, before)
    get_peft_model(model, BSRConfig(trainable_blocks=[2, 3], trainable="lora"))  # the shared weight stays as it is


@pytest.mark.parametrize("method", METHODS)
def test_files_of_two_saves_are_told(method, saved, tmp_path):
    shutil.copytree(saved(method), tmp_path / "adapter")
    other = make_adapter(method)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "adapter")
    base = make_vit()
    before = state_of(base)
    with pytest.raises(AdapterFileError, match=r"was not saved together with the adapter_config\.json next to it"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_state(base, before)


def test_a_setting_that_was_changed_is_told_and_can_be_meant(saved, tmp_path):
    shutil.copytree(saved("bsr"), tmp_path / "adapter")
    values = settings(tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps({**values, "keep_rate": 0.75}))
    with pytest.raises(AdapterFileError, match=r"was changed after it was saved.*remove `digests`"):
        PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")
    unseal(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")
    assert loaded.peft_config["default"].keep_rate == 0.75
    moved = {**values, "base_model_name_or_path": "elsewhere", "revision": "main"}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(moved))
    PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")  # where the base model is may change
    renamed = {"keep_ratd" if name == "keep_rate" else name: value for name, value in values.items()}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(renamed))
    with pytest.raises(AdapterFileError, match="was changed after it was saved"):
        PeftModel.from_pretrained(make_vit(), tmp_path / "adapter")


@pytest.mark.parametrize("method", METHODS)
def test_a_file_without_fingerprint_and_digests_loads(method, saved, tmp_path):
    shutil.copytree(saved(method), tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    old = {n: v for n, v in settings(path.parent).items() if n not in ("digests", "fingerprint")}
    path.write_text(json.dumps(old))
    PeftModel.from_pretrained(make_vit(seed=1), path.parent).save_pretrained(tmp_path / "new")
    assert settings(tmp_path / "new")["fingerprint"]["family"] == "vit"


@pytest.mark.parametrize("method", METHODS)
def test_a_base_of_other_weights_is_warned_of(method, saved):
    with pytest.warns(OtherWeightsWarning, match="other weights than the one that the adapter was trained on"):
        PeftModel.from_pretrained(make_vit(seed=1), saved(method))


def test_a_second_adapter_knows_the_bare_model(tmp_path):
    model = make_adapter("bsr")
    with torch.no_grad():
        model.base_model.model.vit.layers[3].mlp.fc1.bsr_params["default"].weight.add_(1.0)
    model.add_adapter("second", BSRConfig(trainable_blocks=[2]))
    assert model.peft_config["second"].fingerprint == model.peft_config["default"].fingerprint
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_vit(), tmp_path / "second")  # without a warning


@pytest.mark.skipif(os.name != "posix", reason="processes are asked for by signal 0")
def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    model = make_adapter("bsr")
    model.save_pretrained(tmp_path)
    for name in (f".saving-{dead.pid}", f".saving-{os.uname().nodename}-{dead.pid}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_text("{}")
    running = [tmp_path / f".saving-{os.getppid()}", tmp_path / f".saving-elsewhere-{dead.pid}"]
    for folder in running:
        folder.mkdir()
    model.save_pretrained(tmp_path)
    assert sorted(tmp_path.glob(".saving-*")) == sorted(running), "those of running processes and of others stay"


def test_the_file_says_what_the_model_was(saved):
    for method in METHODS:
        values = settings(saved(method))
        assert set(values["digests"]) == {"settings", "weights"}
        assert values["fingerprint"]["depth"] == 4 and len(values["fingerprint"]["weights"]) == 32
