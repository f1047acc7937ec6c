"""Routes tokens to experts, and runs the experts on tokens grouped by expert.

Shapes: n tokens (images and their tokens flattened), D width, E experts, k of which are chosen for each token, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_bsr.core.grouped import Groups, Product
from peft_bsr.core.reduction import is_traced


@dataclass(frozen=True)
class Choice:
    """The experts that are chosen for each token.

    Attributes:
        probabilities: Softmax over all experts, [n, E], in fp32 or wider.
        weights: Weights of the chosen experts, [n, k], in the same dtype.
        experts: Indices of the chosen experts, [n, k] int64, best first.
    """

    probabilities: Tensor
    weights: Tensor
    experts: Tensor

    def counts(self) -> Tensor:
        """Number of tokens of each expert, [E] int64."""
        chosen = self.experts.flatten()
        # not `bincount`: for a compiler, its length depends on the data
        counts = chosen.new_zeros(self.probabilities.shape[1])
        return counts.scatter_add(0, chosen, torch.ones_like(chosen))


def choose_experts(logits: Tensor, top_k: int, renormalize: bool = True) -> Choice:
    """Softmax over all experts, then the k best.

    Args:
        logits: Logits of the gate, [n, E].
        top_k: Number of experts per token, k.
        renormalize: Whether to divide the chosen weights by their sum, so that identical experts compute the same as
            one of them. The paper's release does not: its layers start at about k / E of the MLP. Default True.

    Examples:
        >>> choose_experts(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2).experts.tolist()
        [[1, 2]]
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, experts = probabilities.topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Choice(probabilities, weights, experts)


def gate_logits(tokens: Tensor, gates: Tensor, tasks: int | Tensor) -> Tensor:
    """Logits of each token from the gate of its image's task, without a loop over images or tasks.

    Args:
        tokens: [B, N, D].
        gates: Weights of the gates, [T, E, D].
        tasks: Index of the batch's task, or one index per image, [B] int64.

    Returns:
        [B, N, E].
    """
    if isinstance(tasks, int):
        return torch.nn.functional.linear(tokens, gates[tasks])
    return torch.bmm(tokens, gates[tasks].transpose(1, 2))


def run_experts(tokens: Tensor, choice: Choice, run: Callable[[Tensor, Product], Tensor]) -> Tensor:
    """Weighted sum of the outputs of the chosen experts. Other experts do not run, so the cost is proportional to k.

    On the CPU, the group of each expert has exactly its tokens. On other devices, where this would need a host
    synchronization, and in graphs (`torch.compile`, `torch.export`, ONNX), groups are padded, see `Groups`.

    Args:
        tokens: [n, D].
        choice: The experts of each token.
        run: (tokens grouped by expert, product with stacked weights, see `Groups.product`) -> outputs of any width.
            The last axis is the width; other operations than the products act on each row separately.

    Returns:
        Outputs [n, width], in the dtype of `run`.

    Examples:
        >>> choice, weights = choose_experts(torch.randn(5, 3), top_k=2), torch.randn(3, 6, 4)
        >>> run_experts(torch.randn(5, 4), choice, lambda part, product: product(part, weights, None)).shape
        torch.Size([5, 6])
    """
    groups = Groups(choice.experts, choice.probabilities.shape[1], is_traced() or tokens.device.type != "cpu")
    outputs = run(tokens.index_select(0, groups.rows).unflatten(0, groups.shape), groups.product)
    chosen = outputs.flatten(0, -2).index_select(0, groups.places).unflatten(0, choice.experts.shape)
    return (chosen * choice.weights.to(outputs.dtype)[:, :, None]).sum(dim=1)


def balance_loss(choice: Choice) -> Tensor:
    """CV^2 of the experts' importance plus CV^2 of their load, a scalar. 0 if all experts are used equally.

    Importance is the sum of an expert's weights over the tokens that chose it, load is the number of these tokens. CV^2
    is the variance divided by the square of the mean.

    Source: Shazeer et al. (arXiv 1701.06538), eqs. 6, 7, 11, as in M3ViT. Difference: load is counted, not estimated
    through the noise, so only importance has a gradient.
    """
    importance = torch.zeros_like(choice.probabilities).scatter(1, choice.experts, choice.weights).sum(dim=0)
    return _squared_variation(importance) + _squared_variation(choice.counts().to(importance.dtype))


def _squared_variation(values: Tensor) -> Tensor:
    return values.var(correction=min(1, len(values) - 1)) / (values.mean().square() + 1e-10)
