"""What is typed is read by the type of its field, on the command line and in a file alike."""

from __future__ import annotations

import pytest
import yaml
from transformers import TrainingArguments

from peft_bsr import ALaSTConfig, BSRConfig
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.values import Loader, read_fields, read_pairs
from peft_bsr.errors import UsageError
from peft_bsr.training import default_learning_rate


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("eval_strategy=no", "no"),
        ('save_strategy="no"', "no"),
        ("report_to=none", "none"),
        ("run_name=1e-2", "1e-2"),
        ("run_name=on", "on"),
        ("fp16=no", False),
        ("bf16=True", True),
        ("weight_decay=1e-2", 0.01),
        ("weight_decay=.1", 0.1),
        ("seed=1e3", 1000),
        ("label_names=[a, b]", ["a", "b"]),
        ('lr_scheduler_kwargs={"num_cycles": 2}', {"num_cycles": 2}),
        ("eval_steps=null", None),
        ("max_grad_norm=0", 0.0),
    ],
)
def test_a_field_of_trainer(typed, value):
    (found,) = read_fields(read_pairs([typed]), TrainingArguments).values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("typed", "config"),
    [
        (["lean=off", "fuse_dropped=no"], BSRConfig(lean="off", fuse_dropped=False)),
        (["keep_rate=5e-1", "trainable_blocks=[1, 3]"], BSRConfig(keep_rate=0.5, trainable_blocks=[1, 3])),
        (["trainable_blocks=last:3", "lora_alpha=8"], BSRConfig(trainable_blocks="last:3", lora_alpha=8.0)),
        (["alpha=lr", "train_embeddings=yes"], ALaSTConfig(alpha="lr", train_embeddings=True)),
        (["alpha=1e-1", "initial_budget=null"], ALaSTConfig(alpha=0.1)),
    ],
)
def test_an_option_of_a_method(typed, config):
    assert type(config)(**read_fields(read_pairs(typed), type(config))) == config


def test_a_file_means_what_flags_mean(tmp_path):
    text = (
        "model: m\noptions: {lean: off, fuse_dropped: no}\ntrainer: {eval_strategy: no, bf16: yes, weight_decay: 1e-2}"
    )
    settings = TrainSettings(**yaml.load(text, Loader))
    assert settings.options == {"lean": "off", "fuse_dropped": False}
    assert settings.trainer == {"eval_strategy": "no", "bf16": True, "weight_decay": 0.01}
    settings.write(tmp_path / "settings.yaml")
    assert TrainSettings(**yaml.load((tmp_path / "settings.yaml").read_text(), Loader)) == settings


def test_the_default_rate_is_that_of_what_the_preset_trains():
    assert TrainSettings("model", options={"preset": "balanced"}).rate == default_learning_rate(
        "bsr", {"trainable": "lora"}
    )
    assert TrainSettings("model", options={"keep_rate": "0.7"}).rate == default_learning_rate("bsr")


@pytest.mark.parametrize("name", ["flip", "cache", "compile", "skip_bad"])
def test_a_switch_in_a_file_is_read_by_its_word(name):
    for word, value in {"no": False, "off": False, "False": False, "yes": True, "On": True, "true": True}.items():
        assert getattr(TrainSettings(**yaml.load(f"model: m\n{name}: {word}", Loader)), name) is value
    for word in ("never", "0", "null"):
        with pytest.raises(UsageError, match=f"`{name}: .*` must be true or false"):
            TrainSettings(**yaml.load(f"model: m\n{name}: {word}", Loader))
