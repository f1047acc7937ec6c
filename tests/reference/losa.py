"""LoSA, literally, in NumPy: one image at a time, one channel at a time in the token mixer.

`p` holds a mixer's weights under the names of its modules in the adapter's file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from bsr_block import gelu, layer_norm

Weights = dict[str, np.ndarray]


def mixer(u: np.ndarray, p: Weights, rows: np.ndarray | None = None, eps: float = 1e-5) -> np.ndarray:
    """c + t [N, D] of u [N, D]; `rows` are the places of its tokens, whose part of the token mixer they get."""
    v = layer_norm(u, p["norm.weight"], p["norm.bias"], eps)
    c = np.stack(
        [
            p["channel_up.weight"] @ gelu(p["channel_down.weight"] @ token + p["channel_down.bias"])
            + p["channel_up.bias"]
            for token in v
        ]
    )
    if "token_down.weight" not in p:
        return c
    rows = np.arange(len(u)) if rows is None else rows
    down, up, bias = p["token_down.weight"][:, rows], p["token_up.weight"][rows], p["token_up.bias"][rows]
    channels = [up @ gelu(down @ channel + p["token_down.bias"]) + bias for channel in (v + c).T]
    return c + np.stack(channels, axis=1)


def refined(
    outputs: list[np.ndarray], mixers: dict[int, Weights], places: list[np.ndarray] | None = None
) -> np.ndarray:
    """b_L + y_L from the outputs b_i [N_i, D] of all blocks, and for fewer tokens, the places of those alive."""
    everything = np.arange(len(outputs[0]))
    places = places or [everything for _ in outputs]
    y: dict[int, np.ndarray] = {}  # by place in the full sequence
    for index, b in enumerate(outputs):
        state = np.stack([y.get(int(place), np.zeros(b.shape[1])) for place in places[index]])
        if index in mixers:
            state = state + mixer(b + state, mixers[index], places[index])
        y = {int(place): row for place, row in zip(places[index], state, strict=True)}
    return outputs[-1] + state
