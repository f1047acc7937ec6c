"""On a CUDA card: what the CPU tests say holds there too. `make test-gpu`; where there is no card, all of it skips."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.cost import PeakMemory
from tests.gpu.setting import (
    DEVICE,
    LEVELS,
    METHODS,
    ON_A_CARD,
    ONLY_CUDA,
    REDUCED,
    SIZES,
    assert_near,
    autocast,
    batch,
    gradients,
    make,
)

pytestmark = ON_A_CARD


@pytest.mark.parametrize("settings", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_lean_gives_the_stock_gradients(settings, dtype):
    if dtype is None and "frozen_weights" in settings:
        pytest.skip("frozen weights in bf16 are for autocast")
    stock = make(BSRConfig(**REDUCED, **settings | {"lean": "off"}))
    expected = gradients(stock, dtype=dtype)
    assert_near(gradients(make(BSRConfig(**REDUCED, **settings)), dtype=dtype), expected, 2e-2 if dtype else 1e-5)


def test_int8_has_the_gradients_mean():
    expected = gradients(make(BSRConfig(**REDUCED)))
    model = make(METHODS["int8"]())
    runs = [gradients(model) for _ in range(16)]
    mean = {name: torch.stack([run[name] for run in runs]).mean(dim=0) for name in expected}
    assert_near(mean, expected, 1e-2)


def test_keep_rate_one_is_the_untouched_model():
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**SIZES)).to(DEVICE).eval()
    expected = base(**batch()).logits
    model = get_peft_model(base, BSRConfig(trainable_blocks=[1, 3], keep_rate=1.0)).eval()
    assert torch.equal(model(**batch()).logits, expected)


@ONLY_CUDA
@pytest.mark.parametrize("method", METHODS)
def test_a_forward_and_a_backward_never_wait_for_the_device(method):
    model, inputs = make(METHODS[method]()), batch(method=method)
    model(**inputs).loss.backward()  # ALaST draws at a step's first forward, the one time that it waits
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("method", ["bsr", "lora", "experts", "alast", "synqt"])
def test_checkpointing_gives_the_same_gradients(method):
    model = make(METHODS[method]())
    expected = gradients(model, **batch(method=method))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_near(gradients(model, **batch(method=method)), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_training_under_autocast_and_a_gradient_scaler(method, dtype):
    model, inputs = make(METHODS[method]()), batch(method=method)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype is torch.float16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(20):
        with autocast(dtype):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_experts_by_block_are_experts_by_size():
    """A card groups tokens in another way than the CPU."""
    model, inputs = make(METHODS["experts"]()), batch(method="experts")
    found = {name: gradient.cpu() for name, gradient in gradients(model, **inputs).items()}
    inputs = {name: value.cpu() if torch.is_tensor(value) else value for name, value in inputs.items()}
    assert_near(found, gradients(model.cpu(), **inputs), 1e-4)


@ONLY_CUDA
def test_base_weights_are_parked_off_the_card_and_come_back():
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**SIZES)).to(DEVICE).eval()
    expected, before = base(**batch()).logits, torch.cuda.memory_allocated()
    model = get_peft_model(base, BSRConfig(trainable_blocks="every:1", init_weights=False)).eval()
    adapted = model(**batch()).logits
    assert torch.cuda.memory_allocated() < before + 4 * 2**20, "trained weights are there once"
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(**batch()).logits, adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lean", ["exact", "off"])
def test_adapters_come_and_go_above_parked_weights(lean):
    """A low-rank update is tried and made on the card; the base weights come back when their copy is deleted."""
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**SIZES)).to(DEVICE).eval()
    expected, every = base(**batch()).logits, {"trainable_blocks": "every:1", "keep_rate": 1.0}
    model = get_peft_model(base, BSRConfig(**every, init_weights=False)).eval()
    model.add_adapter("lora", BSRConfig(**every, trainable="lora", lean=lean))
    for name in ("lora", "default"):
        model.set_adapter(name)
    model.delete_adapter("lora")
    model.delete_adapter("default")
    assert all(parameter.device.type == DEVICE for parameter in base.parameters())
    torch.testing.assert_close(base(**batch()).logits, expected, rtol=1e-5, atol=1e-5)


@ONLY_CUDA
def test_lean_takes_less_memory():
    peaks = {}
    for lean in ("off", "exact", "max"):
        model, inputs = make(BSRConfig(trainable_blocks="every:1", keep_rate=1.0, lean=lean)), batch(32)
        model(**inputs).loss.backward()
        with PeakMemory(DEVICE) as memory:
            model(**inputs).loss.backward()
        peaks[lean] = memory.added_bytes
    assert peaks["max"] < peaks["exact"] < peaks["off"]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_goes_to_a_file_and_to_the_other_device(method, tmp_path):
    model = make(METHODS[method]()).eval()
    inputs = {"pixel_values": batch()["pixel_values"], **({"task": "b"} if method == "experts" else {})}
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(ViTForImageClassification(ViTConfig(**SIZES)), tmp_path).eval()
    on_cpu = again(**inputs | {"pixel_values": inputs["pixel_values"].cpu()}).logits
    torch.testing.assert_close(on_cpu, expected.cpu(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.to(DEVICE)(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_two_adapters_side_by_side():
    model = make(BSRConfig(**REDUCED, init_weights=False)).eval()
    first = model(**batch()).logits
    model.add_adapter("second", BSRConfig(trainable_blocks=[2], keep_rate=1.0, init_weights=False))
    model.set_adapter("second")
    assert not torch.allclose(model(**batch()).logits, first)
    model.set_adapter("default")
    assert torch.equal(model(**batch()).logits, first)
