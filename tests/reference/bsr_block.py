"""The paper's block, literally, in NumPy: loops where the paper has sums, no batching tricks."""

from __future__ import annotations

import math

import numpy as np


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def softmax(x: np.ndarray) -> np.ndarray:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def bsr_block(
    x: np.ndarray, w: dict[str, np.ndarray], heads: int, eps: float, prefix: int, keep_rate: float, fuse: bool
) -> np.ndarray:
    """One image [N, D] through attention, residual, reduction, MLP, residual.

    `w` holds the block's weights under the names that ViTLayer gives them.
    """
    tokens, width = x.shape
    d = width // heads
    y = layer_norm(x, w["layernorm_before.weight"], w["layernorm_before.bias"], eps)
    q, k, v = (y @ w[f"attention.{n}_proj.weight"].T + w[f"attention.{n}_proj.bias"] for n in "qkv")
    attended = np.zeros_like(x)
    class_rows = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        attention = softmax(q[:, part] @ k[:, part].T / math.sqrt(d))
        class_rows.append(attention[0])
        attended[:, part] = attention @ v[:, part]
    x = x + attended @ w["attention.o_proj.weight"].T + w["attention.o_proj.bias"]

    scores = np.mean(class_rows, axis=0)[prefix:]
    keep = math.ceil(keep_rate * (tokens - prefix))
    best = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])
    rest = [i for i in range(len(scores)) if i not in best]
    parts = [x[:prefix], x[[prefix + i for i in best]]]
    if fuse and rest:
        parts.append(sum(scores[i] * x[prefix + i] for i in rest)[None])
    x = np.concatenate(parts)

    y = layer_norm(x, w["layernorm_after.weight"], w["layernorm_after.bias"], eps)
    y = gelu(y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return x + y
