"""The size is what the model's own processor makes; a model without one gets its type's, said aloud."""

from __future__ import annotations

import pytest
from transformers import (
    BitImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from peft_bsr import DatasetError, ProcessorWarning
from peft_bsr.data import load_processor, size_of


def test_the_size_is_that_of_the_crop(tmp_path):
    Dinov2Config(image_size=518).save_pretrained(tmp_path)
    size, crop = {"shortest_edge": 256}, {"height": 224, "width": 224}
    BitImageProcessorPil(size=size, crop_size=crop, do_center_crop=True).save_pretrained(tmp_path)
    processor = load_processor(str(tmp_path))
    assert size_of(processor) == (224, 224)
    assert not processor.do_center_crop
    assert size_of(load_processor(str(tmp_path), 98)) == (98, 98)


@pytest.mark.parametrize(
    "config", [ViTConfig(image_size=64), CLIPVisionConfig(image_size=64)], ids=lambda c: c.model_type
)
def test_a_model_of_one_size_gets_that_size(tmp_path, config):
    config.save_pretrained(tmp_path)
    ViTImageProcessorPil().save_pretrained(tmp_path)  # of 224, as it comes
    assert size_of(load_processor(str(tmp_path))) == (64, 64)


def test_sizes_that_are_no_square(tmp_path):
    ViTImageProcessorPil(size={"height": 32, "width": 64}).save_pretrained(tmp_path)
    assert size_of(load_processor(str(tmp_path))) == (32, 64)


def test_a_model_without_a_processor_gets_its_types(tmp_path):
    ViTConfig(image_size=96).save_pretrained(tmp_path)
    with pytest.warns(ProcessorWarning, match=r"ViTImageProcessor.*: mean 0.5, 0.5, 0.5, std 0.5"):
        processor = load_processor(str(tmp_path))
    assert size_of(processor) == (96, 96), "what the model was pretrained at, not what the type's default is"
    processor = load_processor(str(tmp_path), mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    assert (processor.image_mean, processor.image_std) == ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])


def test_types_of_towers(tmp_path):
    CLIPVisionConfig(image_size=96).save_pretrained(tmp_path)
    with pytest.warns(ProcessorWarning, match=r"CLIPImageProcessor.*mean 0.481, 0.458"):
        assert size_of(load_processor(str(tmp_path))) == (96, 96)


def test_a_type_without_a_processor_is_told_mean_and_std(tmp_path):
    DINOv3ViTConfig(image_size=96).save_pretrained(tmp_path)  # transformers' own needs torchvision
    with pytest.raises(DatasetError, match=r"none for models of type `dinov3_vit` .* Give `--mean` and `--std`, or"):
        load_processor(str(tmp_path), mean=[0.1, 0.2, 0.3])
    processor = load_processor(str(tmp_path), mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    assert size_of(processor) == (96, 96)
    assert (processor.image_mean, processor.image_std) == ([0.1, 0.2, 0.3], [1.0, 1.0, 1.0])


def test_what_cannot_be(tmp_path):
    with pytest.raises(DatasetError, match="has no image processor and no configuration"):
        load_processor(str(tmp_path))
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(DatasetError, match="`--mean` needs 3 numbers, one per channel, not 1"):
        load_processor(str(tmp_path), mean=[0.5])
