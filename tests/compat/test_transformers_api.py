"""What the package uses of transformers without a promise. A test that fails names what a new release changed."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.dinov3_vit import modeling_dinov3_vit
from transformers.models.vit import modeling_vit

from peft_bsr.compat import transformers_api

TINY = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**TINY)).eval()


@pytest.fixture
def attention(model):
    return next(module for module in model.modules() if type(module).__name__ == "ViTAttention")


def test_implementation_and_attention_functions(model, attention):
    """An attention looks its function up by the attribute of its config at each call."""
    calls = []

    def function(module, query, key, value, attention_mask, scaling=None, **kwargs):
        calls.append((module, query.shape, scaling))
        return query.transpose(1, 2), None

    AttentionInterface.register("compat test", function)
    assert transformers_api.attention_functions["compat test"] is function
    assert "nothing" not in transformers_api.attention_functions and "sdpa" in transformers_api.attention_functions
    assert getattr(attention.config, transformers_api.IMPLEMENTATION) == "sdpa"
    setattr(attention.config, transformers_api.IMPLEMENTATION, "compat test")
    model(torch.zeros(1, 3, 32, 32))
    assert calls[0] == (attention, (1, 2, 5, 4), 4**-0.5) and len(calls) == 2


def test_eager_attention(attention):
    function = transformers_api.function_of(attention, transformers_api.EAGER_ATTENTION)
    assert function is modeling_vit.eager_attention_forward
    query = torch.randn(1, 2, 5, 4)
    output, weights = function(attention, query, query, query, None, scaling=0.5)
    assert output.shape == (1, 5, 2, 4) and weights.shape == (1, 2, 5, 5)
    assert torch.allclose(weights, (query @ query.transpose(2, 3) * 0.5).softmax(-1))


def test_rotate():
    attention = nn.Module.__new__(modeling_dinov3_vit.DINOv3ViTAttention)
    rotate = transformers_api.function_of(attention, transformers_api.ROTATE)
    query, ones, zeros = torch.randn(1, 2, 5, 4), torch.ones(5, 4), torch.zeros(5, 4)
    assert all(torch.equal(found, query) for found in rotate(query, query, ones, zeros))


def test_checkpoint_function(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    block = next(module for module in model.modules() if type(module).__name__ == "ViTLayer")
    function = getattr(block, transformers_api.CHECKPOINT_FUNCTION)
    assert block.gradient_checkpointing and function.keywords["use_reentrant"] is True
    calls = []
    setattr(block, transformers_api.CHECKPOINT_FUNCTION, lambda run, *args: calls.append(run) or run(*args))
    model(torch.zeros(1, 3, 32, 32))
    assert len(calls) == 1, "the block no longer asks its own attribute at each call"


def test_captured_outputs(model, attention):
    seen = []
    handle = attention.register_forward_hook(lambda *_: seen.append(transformers_api.captured_outputs()))
    model(torch.zeros(1, 3, 32, 32))
    model(torch.zeros(1, 3, 32, 32), output_hidden_states=True)
    handle.remove()
    assert seen == [frozenset(), frozenset({"hidden_states"})]
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks and all(map(transformers_api.is_capture_hook, hooks))
    assert not transformers_api.is_capture_hook(print)
    assert transformers_api.captured_outputs() == frozenset()


def test_source(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = ViTForImageClassification.from_pretrained(tmp_path).config
    assert transformers_api.source_of(loaded) == str(tmp_path)
    transformers_api.forget_source(loaded)
    assert transformers_api.source_of(loaded) == ""


def test_classifiers_and_models_of():
    config = ViTConfig(**TINY)
    assert transformers_api.classifiers_of(config) == (ViTForImageClassification,)
    assert transformers_api.model_classes_of(config) == (ViTForImageClassification, ViTModel)
    deit = transformers.DeiTConfig()
    assert [cls.__name__ for cls in transformers_api.classifiers_of(deit)] == [
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
    ]
    assert transformers_api.classifiers_of(transformers.BertConfig()) == ()


def test_class_names_of_task():
    names = transformers_api.class_names_of_task("image-classification")
    assert {"ViTForImageClassification", "DeiTForImageClassificationWithTeacher"} <= names
    assert "ViTModel" in transformers_api.class_names_of_task("image-feature-extraction")


def test_an_image_processor_that_needs_torchvision(tmp_path):
    mean, size = [0.1, 0.2, 0.3], {"height": 48, "width": 48}
    values = {"image_processor_type": "DINOv3ViTImageProcessor", "size": size, "image_mean": mean}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    found = transformers_api.read_image_processor(str(tmp_path))
    assert (dict(found.size), list(found.image_mean)) == (size, mean)
    sound = {"feature_extractor_type": "ASTFeatureExtractor", "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(sound))
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises((OSError, ValueError)):
            transformers_api.read_image_processor(str(folder), local_files_only=True)


def test_image_processor_names():
    name = transformers_api.image_processor_names("vit")["pil"]
    assert issubclass(getattr(transformers, name), transformers.image_processing_base.ImageProcessingMixin)
    assert transformers_api.image_processor_names("nothing") == {}


def test_use_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    arguments = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=8)
    assert arguments.train_batch_size == 24, "Trainer uses DataParallel"
    assert transformers_api.use_one_gpu(arguments) == 2
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.parallel_mode.value) == (1, 8, "not_parallel")
    assert transformers_api.use_one_gpu(arguments) == 0


def test_the_module_that_captures_is_there():
    assert transformers_api._CAPTURING in sys.modules
