"""SynQT, literally, in NumPy: one image at a time, keys and values made, heads in a loop, no dropout.

`w` holds a ViT block's weights under the names that ViTLayer gives them; `p` those that train, under the names of their
modules in the adapter's file.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from bsr_block import bsr_block, gelu, layer_norm, softmax

Weights = dict[str, np.ndarray]


def inside(weights: Weights, name: str) -> Weights:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def linear(x: np.ndarray, w: Weights) -> np.ndarray:
    y = x @ w["weight"].T
    return y + w["bias"] if "bias" in w else y


def adapter(z: np.ndarray, p: Weights) -> np.ndarray:
    """A_r(z) = z + W2 (s gelu(W1 z))."""
    return z + linear(p["scale"] * gelu(linear(z, inside(p, "down"))), inside(p, "up"))


def norm(z: np.ndarray, p: Weights, eps: float = 1e-5) -> np.ndarray:
    return layer_norm(z, p["weight"], p["bias"], eps)


def synthesize(p: Weights, s_feat: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Hq [T, D] from the prompts and the previous layer's H [D]."""
    z = p["prompts"]
    if previous is not None:
        z = z + s_feat * previous
    z = adapter(z, inside(p, "prompt_adapter"))
    y = norm(z, inside(p, "norm1"))
    q, k, v = (norm(adapter(y, inside(p, n)), inside(p, f"{n}_norm")) for n in ("query", "key", "value"))
    attended = softmax(q @ k.T / math.sqrt(z.shape[-1])) @ v
    z = z + p["attention_scale"] * adapter(attended, inside(p, "output"))
    return z + p["ffn_scale"] * adapter(norm(z, inside(p, "norm2")), inside(p, "ffn_adapter"))


def read(hq: np.ndarray, x: np.ndarray, w: Weights, heads: int, eps: float) -> tuple[np.ndarray, ...]:
    """H, F_att, F_ffn, each [D], from queries [T, D] and the block's input tokens [N, D]."""
    attention = inside(w, "attention")
    asked = norm(hq, inside(w, "layernorm_before"), eps)
    tokens = norm(x, inside(w, "layernorm_before"), eps)
    q = linear(asked, inside(attention, "q_proj"))
    k = linear(tokens, inside(attention, "k_proj"))
    v = linear(tokens, inside(attention, "v_proj"))
    d = q.shape[-1] // heads
    mixed = np.zeros_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        mixed[:, part] = softmax(q[:, part] @ k[:, part].T / math.sqrt(d)) @ v[:, part]
    f_att = linear(mixed, inside(attention, "o_proj"))
    state = hq + f_att
    f_ffn = linear(
        gelu(linear(norm(state, inside(w, "layernorm_after"), eps), inside(w, "mlp.fc1"))), inside(w, "mlp.fc2")
    )
    return tuple(t.mean(axis=0) for t in (state + f_ffn, f_att, f_ffn))


def features(x: np.ndarray, blocks: list[Weights], layers: dict[int, Weights], heads: int, eps: float) -> np.ndarray:
    """[1 + 3 L, D] of one image, whose tokens in front of the first block are x [N, D]."""
    s_feat = layers[min(layers)]["feature_scale"]
    reads: list[tuple[np.ndarray, ...]] = []
    for index, w in enumerate(blocks):
        if index in layers:
            reads.append(read(synthesize(layers[index], s_feat, reads[-1][0] if reads else None), x, w, heads, eps))
        x = bsr_block(x, w, heads, eps, prefix=1, keep_rate=1.0, fuse=False)
    return np.stack([reads[-1][0], *(r[0] for r in reads), *(r[1] for r in reads), *(r[2] for r in reads)])


def classify(f: np.ndarray, p: Weights, eps: float) -> np.ndarray:
    """Logits from [1 + 3 L, D]."""
    u = np.stack([row + adapter(norm(row, inside(p, "norm")), inside(p, "adapter")) for row in f])
    w = np.concatenate([[1.0], np.tanh(gelu(linear(u[0], inside(p, "gate"))))])
    fused = np.mean([weight * row for weight, row in zip(w, u, strict=True)], axis=0)
    return linear(norm(fused, inside(p, "final_norm"), eps), inside(p, "classifier"))
