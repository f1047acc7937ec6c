"""On a CUDA card: what the CPU tests say holds there too. `make test-gpu`; where there is no card, all of it skips."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig, BSRConfig, SynQTConfig
from peft_bsr.cost import PeakMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
SIZES |= {"image_size": 112, "patch_size": 8, "num_labels": 5}  # 197 tokens
REDUCED = {"trainable_blocks": [1, 3], "reduction_blocks": [1], "keep_rate": 0.6}
LEVELS = [
    {"lean": "exact"},
    {"lean": "max"},
    {"lean": "exact", "trainable": "lora"},
    {"lean": "max", "trainable": "lora"},
    {"lean": "exact", "frozen_weights": "bfloat16"},
]
METHODS = {
    "bsr": lambda: BSRConfig(**REDUCED),
    "int8": lambda: BSRConfig(**REDUCED, saved_activations="int8"),
    "lora": lambda: BSRConfig(**REDUCED, trainable="lora"),
    "alast": lambda: ALaSTConfig(trainable_blocks_per_step=2),
    "synqt": lambda: SynQTConfig(dropout=0.0, drop_path=0.0),
}


def batch(size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(size, 3, 112, 112, generator=generator), torch.arange(size) % 5
    return {"pixel_values": images.cuda(), "labels": labels.cuda()}


def make(config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(ViTForImageClassification(ViTConfig(**SIZES)), config).cuda().train()


def gradients(model: PeftModel, run: Any = None, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", dtype) if dtype else nullcontext():
        loss = (run or model)(**batch()).loss
    loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float) -> None:
    assert found.keys() == expected.keys() and found
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=share * scale, msg=name)


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 products in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)


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
    base = ViTForImageClassification(ViTConfig(**SIZES)).cuda().eval()
    expected = base(**batch()).logits
    model = get_peft_model(base, BSRConfig(trainable_blocks=[1, 3], keep_rate=1.0)).eval()
    assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_forward_and_a_backward_never_wait_for_the_device(method):
    model, inputs = make(METHODS[method]()), batch()
    model(**inputs).loss.backward()  # ALaST draws at a step's first forward, the one time that it waits
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("settings", [*LEVELS[:3], {"lean": "off"}], ids=str)
def test_compiled(settings, mode):
    model = make(BSRConfig(**REDUCED, **settings))
    expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):  # CUDA graphs are recorded in the second run
        assert_near(gradients(model, compiled), expected, 1e-5)


def test_synqt_compiled():
    model = make(METHODS["synqt"]())
    expected = gradients(model)
    assert_near(gradients(model, torch.compile(model, fullgraph=True)), expected, 1e-5)


@pytest.mark.parametrize("method", ["bsr", "lora", "alast", "synqt"])
def test_checkpointing_gives_the_same_gradients(method):
    model = make(METHODS[method]())
    expected = gradients(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_near(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_under_a_gradient_scaler(method):
    model, scaler, inputs = make(METHODS[method]()), torch.amp.GradScaler("cuda"), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", torch.float16):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_lean_takes_less_memory():
    peaks = {}
    for lean in ("off", "exact", "max"):
        model, inputs = make(BSRConfig(trainable_blocks="every:1", keep_rate=1.0, lean=lean)), batch(32)
        model(**inputs).loss.backward()
        with PeakMemory("cuda") as memory:
            model(**inputs).loss.backward()
        peaks[lean] = memory.added_bytes
    assert peaks["max"] < peaks["exact"] < peaks["off"]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_goes_to_a_file_and_to_the_other_device(method, tmp_path):
    model = make(METHODS[method]())
    model.eval()
    expected = model(**batch()).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**SIZES))
    base.load_state_dict(copy.deepcopy(make(METHODS["bsr"]()).unload().cpu().state_dict()))
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    on_cpu = again(**{name: tensor.cpu() for name, tensor in batch().items()}).logits
    torch.testing.assert_close(on_cpu, expected.cpu(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again.cuda()(**batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_two_adapters_side_by_side():
    model = make(BSRConfig(**REDUCED, init_weights=False)).eval()
    first = model(**batch()).logits
    model.add_adapter("second", BSRConfig(trainable_blocks=[2], keep_rate=1.0, init_weights=False))
    model.set_adapter("second")
    assert not torch.allclose(model(**batch()).logits, first)
    model.set_adapter("default")
    assert torch.equal(model(**batch()).logits, first)
