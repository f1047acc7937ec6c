"""Training under autocast to bfloat16 for every family, with CUDA's rule for the dtypes of layer norm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import SUPPORTED, run_batch
from peft import get_peft_model
from torch import Tensor, nn

from peft_bsr import BSRConfig
from peft_bsr.backbones import tensors_of

SOON = ("vit", "beit", "videomae")
FAMILIES = [pytest.param(name, marks=() if name in SOON else pytest.mark.slow) for name in SUPPORTED]
REDUCED = {"trainable_blocks": [1, 3], "reduction_blocks": [1], "keep_rate": 0.7}


@pytest.fixture(autouse=True)
def norms_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA's layer norm kernel needs tokens and weight of the same dtype, while the CPU's takes mixed dtypes."""
    native = torch.native_layer_norm

    def strict(tokens: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float):
        assert weight is None or weight.dtype == tokens.dtype, f"norm of {tokens.dtype} with {weight.dtype}"
        return native(tokens, shape, weight, bias, eps)

    monkeypatch.setattr(torch, "native_layer_norm", strict)
    yield


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tensors_of(model(**batch))
    sum(output.float().square().mean() for output in outputs if output.is_floating_point()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_finite(found: dict[str, Tensor]) -> None:
    assert found and not [name for name, gradient in found.items() if not gradient.isfinite().all()]


@pytest.mark.parametrize("name", FAMILIES)
def test_training_under_autocast(name):
    batch = run_batch(SUPPORTED[name]())
    assert_finite(gradients(SUPPORTED[name]().train(), batch))  # the stock model
    found = []
    for lean in ("off", "exact"):
        torch.manual_seed(3)
        model = get_peft_model(SUPPORTED[name](), BSRConfig(**REDUCED, lean=lean)).train()
        found.append(gradients(model, batch))
        assert_finite(found[-1])
    stock, lean = found
    assert stock.keys() == lean.keys()
    scale = max(float(gradient.abs().max()) for gradient in stock.values())
    for key, gradient in stock.items():
        torch.testing.assert_close(lean[key], gradient, rtol=0, atol=0.05 * scale, msg=lambda m, k=key: f"{k} {m}")
