"""Predictions against what is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from peft_bsr import ALaSTConfig, BSRConfig, ConfigError, SynQTConfig, UnsupportedModelError
from peft_bsr.backbones import tensors_of
from peft_bsr.cost import count_flops, estimate, model_memory, plan_for_budget, saved_activations
from peft_bsr.engine import WeightOffload
from peft_bsr.tuners.blocks.layer import BlockWeights

SMALL = {"num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
SMALL |= {"image_size": 96, "patch_size": 16}
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, num_labels=10)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)),
}
CONFIGS = {
    "full": lambda: None,
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"]),
    "stock": lambda: BSRConfig(trainable_blocks=[1, 3], lean="off"),
    "exact": lambda: BSRConfig(trainable_blocks=[1, 3]),
    "max": lambda: BSRConfig(trainable_blocks=[1, 3], lean="max"),
    "int8": lambda: BSRConfig(trainable_blocks=[1, 3], saved_activations="int8"),
    "lora in blocks": lambda: BSRConfig(trainable_blocks=[1, 3], trainable="lora"),
    "all tokens": lambda: BSRConfig(trainable_blocks="last:2", reduction_blocks=[]),
    "full view": lambda: BSRConfig(trainable_blocks=[1, 3], mode="full_view"),
    "alast": lambda: ALaSTConfig(trainable_blocks_per_step=2, selection="sample"),
    "alast prefix": lambda: ALaSTConfig(trainable_blocks_per_step=2, selection="prefix"),
    "synqt": lambda: SynQTConfig(),
    "synqt fewer tokens": lambda: SynQTConfig(layers=[0, 2], keep_rate=0.5, kept_tokens="int8"),
}


def on_meta(make) -> torch.nn.Module:
    with torch.device("meta"):
        return make()


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("model", "config"),
    [(m, c) for m in MODELS for c in CONFIGS if not (m == "siglip" and c.startswith("synqt"))],  # it has no classifier
)
def test_saved_activations_and_flops_are_those_of_the_real_step(model, config):
    found = estimate(on_meta(MODELS[model]), CONFIGS[config](), batch_size=3)
    real = MODELS[model]()
    if CONFIGS[config]() is not None:
        real = get_peft_model(real, CONFIGS[config]())
    real.train()
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    images = torch.randn(3, 3, 96, 96)

    def loss() -> torch.Tensor:
        return sum(t.float().sum() for t in tensors_of(real(pixel_values=images)) if t.requires_grad)

    assert found.saved_bytes == pytest.approx(saved_activations(real, loss), rel=0.02)
    assert found.training_flops == pytest.approx(count_flops(lambda: loss().backward()), rel=1e-6)
    assert found.trainable_parameters == trained
    if config in ("stock", "exact", "max", "int8", "synqt", "synqt fewer tokens"):
        assert found.plan == real.base_model.plan()


@pytest.mark.parametrize("plain", ["exact", "synqt"])
def test_frozen_weights_in_8_bits_are_counted(plain):
    config = replace(CONFIGS[plain](), frozen_weights="int8")
    whole, found = (estimate(on_meta(MODELS["vit"]), c, batch_size=1) for c in (CONFIGS[plain](), config))
    assert found.saved_bytes == whole.saved_bytes
    assert found.workspace_bytes - whole.workspace_bytes == 192 * 768 * 4  # the largest weight, for its product
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = get_peft_model(MODELS["vit"](), config)
    held = model_memory(model)
    offloaded = sum(p.nbytes for layer in model.modules() if isinstance(layer, BlockWeights) and layer.offloads_base
                 for p in WeightOffload.takes(layer.base_layer))  # fmt: skip
    assert found.weights_bytes == pytest.approx(held.trainable_bytes + held.frozen_bytes - offloaded, rel=1e-6)


@pytest.mark.parametrize("plain", ["exact", "synqt"])
def test_frozen_weights_in_bfloat16_are_counted(plain):
    config = replace(CONFIGS[plain](), frozen_weights="bfloat16")
    found = estimate(on_meta(MODELS["vit"]), config, batch_size=2)
    model = get_peft_model(MODELS["vit"](), config).train()
    held = model_memory(model)
    offloaded = sum(p.nbytes for layer in model.modules() if isinstance(layer, BlockWeights) and layer.offloads_base
                 for p in WeightOffload.takes(layer.base_layer))  # fmt: skip
    assert found.weights_bytes == pytest.approx(held.trainable_bytes + held.frozen_bytes - offloaded, rel=1e-6)
    images = torch.randn(2, 3, 96, 96)
    saved = saved_activations(model, lambda: sum(t.sum() for t in tensors_of(model(pixel_values=images))))
    assert found.saved_bytes == pytest.approx(saved, rel=0.02)
    with pytest.raises(ConfigError, match="with a model in float16"):
        estimate(on_meta(MODELS["vit"]), config, dtype=torch.float16)


def test_an_adapter_of_a_model_in_half_precision_is_in_float32():
    """PEFT casts it, and with it the gradients and the optimizer's state."""
    images = torch.randn(2, 3, 96, 96, dtype=torch.bfloat16)
    for config in (CONFIGS["exact"](), CONFIGS["lora in blocks"]()):
        found = estimate(on_meta(MODELS["vit"]), config, batch_size=2, dtype=torch.bfloat16)
        model = get_peft_model(MODELS["vit"]().bfloat16(), config).train()
        assert found.optimizer_bytes == 2 * model_memory(model).trainable_bytes
        saved = saved_activations(model, lambda model=model: model(pixel_values=images).logits.sum())
        assert found.saved_bytes == pytest.approx(saved, rel=0.02)


def test_weights_optimizer_and_gradients_are_counted_by_hand():
    trained = sum(p.numel() for p in MODELS["vit"]().parameters())
    for optimizer, states in (("adamw", 2), ("sgd_momentum", 1), ("sgd", 0)):
        found = estimate(on_meta(MODELS["vit"]), batch_size=1, optimizer=optimizer)
        assert found.optimizer_bytes == states * trained * 4
        assert found.weights_bytes == trained * 4
        parts = found.weights_bytes + found.optimizer_bytes + found.gradients_bytes
        assert found.total_bytes == parts + found.activations_bytes + found.workspace_bytes
        assert found.total_bytes >= (2 + states) * trained * 4
    half = estimate(on_meta(MODELS["vit"]), batch_size=1, dtype=torch.bfloat16)
    assert half.weights_bytes == trained * 2
    offloaded = estimate(on_meta(MODELS["vit"]), BSRConfig(trainable_blocks=[1, 3]), batch_size=1)
    assert offloaded.weights_bytes <= 1.02 * trained * 4


def test_checkpointing_keeps_little_and_computes_more():
    stock = estimate(on_meta(MODELS["vit"]), batch_size=8)
    checkpointed = estimate(on_meta(MODELS["vit"]), batch_size=8, gradient_checkpointing=True)
    assert checkpointed.saved_bytes < 0.2 * stock.saved_bytes
    assert checkpointed.total_bytes < stock.total_bytes
    assert 1.15 < checkpointed.training_flops / stock.training_flops < 1.35
    every = {"trainable_blocks": "every:1", "reduction_blocks": [], "trainable": "lora"}
    off, lean = (
        estimate(on_meta(MODELS["vit"]), BSRConfig(**every, lean=level), batch_size=64, gradient_checkpointing=True)
        for level in ("off", "exact")
    )
    assert lean.total_bytes < off.total_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_is_not_there_is_stood_in_for_by_the_cpu():
    here, there = (estimate(on_meta(MODELS["vit"]), batch_size=1, device=d) for d in ("cpu", "cuda"))
    assert there.saved_bytes == here.saved_bytes and there.training_flops == here.training_flops
    trained = 4 * here.trainable_parameters
    assert there.total_bytes >= 5 * trained  # weights, gradients, two states, and AdamW's copy of all it updates
    assert there.total_bytes > here.total_bytes
    with pytest.raises(ConfigError, match="`device='gpu'` is not a device of torch"):
        estimate(on_meta(MODELS["vit"]), device="gpu")
    plans = [plan_for_budget(on_meta(MODELS["vit"]), "1GB", batch_size=1, device=d, limit=1) for d in ("cpu", "cuda")]
    assert [p[0].estimate.total_bytes for p in plans] == [here.total_bytes, there.total_bytes]


def test_larger_images_and_batches():
    small, large = (estimate(on_meta(MODELS["vit"]), BSRConfig(), batch_size=2, image_size=s) for s in (96, 192))
    assert 3.5 < large.training_flops / small.training_flops < 5
    again = estimate(on_meta(MODELS["vit"]), BSRConfig(), batch_size=4)
    assert again.saved_bytes == pytest.approx(2 * small.saved_bytes, rel=0.01)
    assert "peak" in again.describe()


def test_the_model_is_left_as_it_was():
    model = MODELS["vit"]()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    found = estimate(model, batch_size=2)
    assert found.trainable_parameters == sum(p.numel() for p in model.classifier.parameters())
    estimate(model, BSRConfig(), batch_size=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]


def test_bad_questions_are_answered_in_words():
    model = on_meta(MODELS["vit"])
    with pytest.raises(ConfigError, match="`batch_size=0` must be an integer"):
        estimate(model, batch_size=0)
    with pytest.raises(ConfigError, match=r"`optimizer='lion'` is unknown. Use one of 'adamw', 'adamw_fused', "):
        estimate(model, optimizer="lion")
    with pytest.raises(ConfigError, match="asks for block 11, but this model has 4 blocks"):
        estimate(model, BSRConfig(trainable_blocks=[11]))
    with pytest.raises(UnsupportedModelError, match="has no config"):
        estimate(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="cannot be created from its config"):
        estimate(get_peft_model(MODELS["vit"](), BSRConfig()))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing trains"):
        estimate(model)


def test_what_a_method_refuses_is_refused():
    with pytest.raises(UnsupportedModelError, match="the head of SynQT takes the place of the classifier"):
        estimate(on_meta(MODELS["siglip"]), SynQTConfig())
    with pytest.raises(ConfigError, match="with `tasks` costs is not predicted"):
        estimate(on_meta(MODELS["vit"]), BSRConfig(tasks={"a": 2}))
