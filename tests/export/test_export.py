"""torch.export and ONNX with a batch of any size: the graph's outputs are eager's."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

SLOW = pytest.mark.slow
FAMILIES = [
    "vit",
    "dinov2",
    "dinov3",
    "dinov3_compact",
    "beit",
    "siglip",
    *(pytest.param(name, marks=SLOW) for name in ("data2vec", "clip_bare", "vjepa2", "mlcd", "siglip_pooling")),
]
STRICT_FAMILIES = [
    "vit",
    *(
        pytest.param(name, marks=SLOW)
        for name in (
            "dinov2",
            "dinov3",
            "dinov3_compact",
            "beit",
            "siglip",
            "data2vec",
            "clip_bare",
            "vjepa2",
            "mlcd",
            "siglip_pooling",
        )
    ),
]
# Data2Vec is not here: torch 2.13 cannot decompose `scaled_dot_product_attention` with a bias for ONNX ("Cannot view a
# tensor", without an adapter too), and with eager attention this family does not reduce tokens; the old exporter can
ONNX_FAMILIES = [
    "vit",
    *(
        pytest.param(name, marks=SLOW)
        for name in (
            "dinov2",
            "dinov3",
            "dinov3_compact",
            "beit",
            "siglip",
            "clip_bare",
            "vjepa2",
            "mlcd",
            "siglip_pooling",
        )
    ),
]
ONNX_SETTINGS = {"beit": {"attn_implementation": "eager"}}  # for the same bug of torch


def any_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch", min=2, max=64)},)


@torch.no_grad()
def assert_exports(model: nn.Module, batches: list[Tensor], strict: bool) -> None:
    exported = torch.export.export(model, (batches[0],), dynamic_shapes=any_batch(), strict=strict).module()
    for images in batches:
        torch.testing.assert_close(exported(images), model(images), atol=1e-5, rtol=0)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", FAMILIES)
def test_export(make_wrapped, family):
    assert_exports(*make_wrapped(family), strict=False)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["vit", "dinov3", pytest.param("siglip", marks=SLOW)])
def test_merged_tokens_export(make_wrapped, family):
    assert_exports(*make_wrapped(family, reduction="merge"), strict=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", STRICT_FAMILIES)
def test_strict_export(make_wrapped, family):
    assert_exports(*make_wrapped(family), strict=True)


@pytest.fixture
def quiet():
    """The exporters print their progress, and warn about themselves."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes of tokens are static, as they must
        yield


@torch.no_grad()
def assert_same_in_onnx(path: Path, model: nn.Module, batches: list[Tensor]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in batches:
        (output,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(images), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ONNX_FAMILIES)
def test_onnx(make_wrapped, family, quiet, tmp_path):
    pytest.importorskip("onnxscript")
    model, batches = make_wrapped(family, **ONNX_SETTINGS.get(family, {}))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (batches[0],), path, dynamo=True, verbose=False, input_names=["images"], dynamic_shapes=any_batch()
    )
    assert_same_in_onnx(path, model, batches)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_by_the_old_exporter(make_wrapped, family, quiet, tmp_path):
    pytest.importorskip("onnx")
    model, batches = make_wrapped(family)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (batches[0],), path, dynamo=False, input_names=["images"], dynamic_axes={"images": {0: "batch"}}
    )
    assert_same_in_onnx(path, model, batches)
