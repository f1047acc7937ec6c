"""Tokens without gradients in a ViT, literally: one image at a time, each query for itself, detach where it is said."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear


def loss_with_gradients_of_some(
    weights: dict[str, Tensor],
    embedded: Tensor,
    labels: Tensor,
    heads: int,
    eps: float,
    first: int,
    share: float,
    keep_rates: dict[int, float],
) -> Tensor:
    """Mean loss over images whose tokens [B, N, D] enter the blocks.

    From block `first` on, the class token and the best `share` of the others by the class token's attention in the
    block before (or in block 0, by its own) carry gradients. Blocks of `keep_rates` drop tokens after the attention,
    which are chosen from again.
    """
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("vit.layers."))
    losses = []
    for image, label in zip(embedded, labels, strict=True):
        tokens, chosen = list(image.detach()), set(range(len(image)))
        for index in range(depth):
            w = {n.removeprefix(f"vit.layers.{index}."): v for n, v in weights.items() if f".layers.{index}." in n}
            if index == first == 0:
                chosen = best(attention(w, tokens, set(), heads, eps)[1], share)
            change, scores = attention(w, tokens, chosen if index >= first else set(), heads, eps)
            tokens = [t + c for t, c in zip(tokens, change, strict=True)]
            if index in keep_rates:
                kept = sorted(best(scores, keep_rates[index]))
                tokens, scores = [tokens[i] for i in kept], [scores[i] for i in kept]
            if index in keep_rates or index == first - 1:
                chosen = best(scores, share)
            if index >= first:
                tokens = [t if i in chosen else t.detach() for i, t in enumerate(tokens)]
            tokens = [t + mlp(w, t, eps, index >= first and i in chosen) for i, t in enumerate(tokens)]
        state = norm(weights, "vit.layernorm", tokens[0], eps)
        logits = linear(state, weights["classifier.weight"], weights["classifier.bias"])
        losses.append(cross_entropy(logits[None], label[None]))
    return torch.stack(losses).mean()


def best(scores: list[float], share: float) -> set[int]:
    """The class token, and the best of the others."""
    count = math.ceil(share * (len(scores) - 1))
    return {0, *sorted(range(1, len(scores)), key=lambda i: (-scores[i], i))[:count]}


def attention(
    w: dict[str, Tensor], tokens: list[Tensor], chosen: set[int], heads: int, eps: float
) -> tuple[list[Tensor], list[float]]:
    """Each token's change by the attention, and what the class token attends to."""
    query, key, value = [], [], []
    for i, token in enumerate(tokens):
        y = norm(w, "layernorm_before", token, eps)
        parts = [linear(y, w[f"attention.{n}_proj.weight"], w[f"attention.{n}_proj.bias"]) for n in "qkv"]
        for found, part in zip((query, key, value), parts, strict=True):
            found.append(part.view(heads, -1) if i in chosen else part.view(heads, -1).detach())
    keys, values = torch.stack(key), torch.stack(value)
    changes, scores = [], []
    for i, asked in enumerate(query):
        rows = torch.softmax(torch.einsum("hd,nhd->hn", asked, keys) / math.sqrt(asked.shape[1]), dim=1)
        mixed = torch.einsum("hn,nhd->hd", rows, values).flatten()
        change = linear(mixed, w["attention.o_proj.weight"], w["attention.o_proj.bias"])
        changes.append(change if i in chosen else change.detach())
        if i == 0:
            scores = rows.mean(dim=0).tolist()
    return changes, scores


def mlp(w: dict[str, Tensor], token: Tensor, eps: float, is_chosen: bool) -> Tensor:
    hidden = gelu(linear(norm(w, "layernorm_after", token, eps), w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
    change = linear(hidden, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    return change if is_chosen else change.detach()


def norm(w: dict[str, Tensor], name: str, token: Tensor, eps: float) -> Tensor:
    return layer_norm(token, token.shape, w[f"{name}.weight"], w[f"{name}.bias"], eps)
