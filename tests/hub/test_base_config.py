"""What was given to `from_pretrained` beside the weights comes back with the adapter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    ViTForImageClassification,
)

import peft_bsr
from peft_bsr import AdapterFileError, ALaSTConfig, BSRConfig, ConfigError, HubError
from peft_bsr.cli.sources import load_model
from tests.bad_input.conftest import unseal
from tests.conftest import SIZES, TEXT

pytestmark = pytest.mark.sampled(2)


def logits(model, images):
    with torch.no_grad():
        return model(pixel_values=images).logits


def read(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_settings_that_differ_from_the_file_come_back(base, images, tmp_path):
    given = {"hidden_dropout_prob": 0.25, "layer_norm_eps": 0.5, "hidden_act": "relu"}
    model = get_peft_model(ViTForImageClassification.from_pretrained(base, **given), BSRConfig()).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert read(tmp_path / "adapter")["base_config"] == given
    loaded = peft_bsr.load(tmp_path / "adapter")
    assert {name: getattr(loaded.config, name) for name in given} == given
    assert torch.equal(logits(loaded, images), logits(model, images))
    loaded.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again")["base_config"] == given


def test_a_model_as_its_file_has_it_keeps_nothing(make_adapter, tmp_path):
    make_adapter().save_pretrained(tmp_path)
    assert read(tmp_path)["base_config"] is None


def test_settings_of_an_inner_configuration(tmp_path, images):
    config = CLIPConfig(vision_config=SIZES, text_config=TEXT)
    CLIPForImageClassification(config).save_pretrained(tmp_path / "base")
    config.vision_config.hidden_act = "gelu"
    base = CLIPForImageClassification.from_pretrained(tmp_path / "base", config=config)
    model = get_peft_model(base, BSRConfig()).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert read(tmp_path / "adapter")["base_config"] == {"vision_config": {"hidden_act": "gelu"}}
    assert torch.equal(logits(peft_bsr.load(tmp_path / "adapter"), images), logits(model, images))


def test_a_file_sets_what_the_base_has_a_name_for_and_nothing_else(make_adapter, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")
    planted = {
        "auto_map": {"AutoModel": "x.Y"},
        "_attn_implementation": "eager",
        "unheard_of": 1,
        "hidden_dropout_prob": 0.25,
    }
    unseal(tmp_path / "adapter", base_config=planted)
    config = peft_bsr.load(tmp_path / "adapter").config
    assert config.hidden_dropout_prob == 0.25
    assert not hasattr(config, "unheard_of") and not getattr(config, "auto_map", None)
    assert config._attn_implementation == "sdpa"


CHANNELS = (
    BSRConfig(trainable_blocks="every:1", modules_to_save=["patch_embeddings"], init_weights=False),
    BSRConfig(trainable_blocks="every:1", modules_to_save=["patch_embeddings"], trainable="lora"),
    ALaSTConfig(train_embeddings=True),
)


@pytest.mark.parametrize("config", CHANNELS, ids=["bsr", "bsr_lora", "alast"])
@pytest.mark.parametrize("channels", [1, 4])
def test_new_input_channels_train_and_come_back(channels, config, base, tmp_path):
    vit = ViTForImageClassification.from_pretrained(base, num_channels=channels, ignore_mismatched_sizes=True)
    model = get_peft_model(vit, config)
    images = torch.randn(2, channels, 32, 32)
    peft_bsr.verify_trainability(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft_bsr.load(tmp_path / "adapter")
    assert loaded.config.num_channels == channels
    assert torch.equal(logits(loaded, images), logits(model, images))


@pytest.mark.parametrize(
    "config", [BSRConfig(), BSRConfig(trainable_blocks="every:1"), ALaSTConfig()], ids=["bsr", "every", "alast"]
)
def test_new_input_channels_that_would_be_lost_are_refused(config, base):
    vit = ViTForImageClassification.from_pretrained(base, num_channels=4, ignore_mismatched_sizes=True)
    with pytest.raises(ConfigError, match=r"\[32, 4, 8, 8\] is not from the base model.*train_embeddings=True"):
        get_peft_model(vit, config)


def test_a_model_whose_own_file_has_the_channels_is_taken(base, images, tmp_path):
    vit = ViTForImageClassification.from_pretrained(base, num_channels=4, ignore_mismatched_sizes=True)
    vit.save_pretrained(tmp_path / "four")
    model = get_peft_model(ViTForImageClassification.from_pretrained(tmp_path / "four"), BSRConfig()).eval()
    model.save_pretrained(tmp_path / "adapter")
    images = torch.randn(2, 4, 32, 32)
    assert torch.equal(logits(peft_bsr.load(tmp_path / "adapter"), images), logits(model, images))


def test_embeddings_before_frozen_blocks_are_refused_with_both_ways(make_model):
    with pytest.raises(ConfigError, match=r"no gradient reaches.*trainable_blocks=\"every:1\".*train_embeddings=True"):
        get_peft_model(make_model(), BSRConfig(modules_to_save=["patch_embeddings"]))


def test_a_base_of_other_shape_is_refused(base, make_model, tmp_path):
    vit = ViTForImageClassification.from_pretrained(base, num_channels=4, ignore_mismatched_sizes=True)
    vit.save_pretrained(tmp_path / "four")
    model = get_peft_model(ViTForImageClassification.from_pretrained(tmp_path / "four"), BSRConfig())
    model.save_pretrained(tmp_path / "adapter")
    unseal(tmp_path / "adapter", base_config={"num_channels": 4})
    with pytest.raises(HubError, match="has other shapes for 1 of the weights of ViTForImageClassification"):
        peft_bsr.load(tmp_path / "adapter", base=base)


@pytest.mark.parametrize(
    "loader",
    [
        lambda folder, base: AutoPeftModel.from_pretrained(folder),
        lambda folder, base: PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), folder),
        lambda folder, base: AutoModelForImageClassification.from_pretrained(folder),
        lambda folder, base: ViTForImageClassification.from_pretrained(base).load_adapter(folder),
    ],
    ids=["AutoPeftModel", "PeftModel", "AutoModel", "load_adapter"],
)
def test_other_loaders_name_ours_where_classes_differ(loader, make_adapter, base, tmp_path):
    make_adapter().save_pretrained(tmp_path / "adapter")  # 4 classes on a base of 3
    with pytest.raises(AdapterFileError, match=r"has 4 classes, this model's has 3\. `peft_bsr\.load\(adapter\)`"):
        loader(str(tmp_path / "adapter"), str(base))


def test_a_distilled_checkpoint_is_loaded_as_what_trains(tmp_path, images):
    DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES)).save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"), ["a", "b"])
    assert type(model).__name__ == "DeiTForImageClassification"
    assert model(pixel_values=images, labels=torch.tensor([0, 1])).loss is not None
    get_peft_model(model, BSRConfig()).save_pretrained(tmp_path / "adapter")
    assert type(peft_bsr.load(tmp_path / "adapter").get_base_model()).__name__ == "DeiTForImageClassification"
