"""A mixture of experts, literally: one token at a time, in plain Python over torch scalars' vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def mixture_of_experts(
    tokens: Tensor, tasks: list[int], gates: Tensor, experts: dict[str, Tensor], top_k: int, renormalize: bool
) -> Tensor:
    """[B, N, D] through the experts, image by image and token by token."""
    images = []
    for image, task in zip(tokens, tasks, strict=True):
        outputs = []
        for token in image:
            logits = gates[task] @ token
            exponentials = torch.exp(logits - logits.max())
            probabilities = exponentials / exponentials.sum()
            chosen = sorted(range(len(logits)), key=lambda e: -float(probabilities[e]))[:top_k]
            total = sum(probabilities[e] for e in chosen) if renormalize else 1.0
            output = torch.zeros_like(token)
            for e in chosen:
                hidden = experts["first_weight"][e] @ token + experts["first_bias"][e]
                hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
                output = output + probabilities[e] / total * (
                    experts["second_weight"][e] @ hidden + experts["second_bias"][e]
                )
            outputs.append(output)
        images.append(torch.stack(outputs))
    return torch.stack(images)
