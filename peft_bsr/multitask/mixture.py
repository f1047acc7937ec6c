"""The mixture of experts that replaces the MLP of a block.

Shapes: B images, N tokens, n = B * N, D width, F hidden width of the MLP, E experts, r rank, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from peft_bsr.core import Choice, Product, TaskCall, balance_loss, choose_experts, gate_logits, run_experts
from peft_bsr.multitask.config import MoEConfig


@dataclass(frozen=True)
class PlainMLP:
    """The parts of a block's own MLP, as functions.

    Attributes:
        first: D -> F.
        activation: Element-wise.
        second: F -> D.
    """

    first: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


class FullExperts(nn.Module):
    """Experts that are separate MLPs, stacked; all start as copies of the pretrained MLP.

    Args:
        first: Weight [F, D] and bias [F] or None.
        second: Weight [D, F] and bias [D] or None.
        config: Configuration of the mixture.
    """

    first_weight: Tensor
    first_bias: Tensor | None
    second_weight: Tensor
    second_bias: Tensor | None

    def __init__(
        self, first: tuple[Tensor, Tensor | None], second: tuple[Tensor, Tensor | None], config: MoEConfig
    ) -> None:
        super().__init__()
        self.rate = config.dropout
        for name, values in zip(("first", "second"), (first, second), strict=True):
            for part, value in zip(("weight", "bias"), values, strict=True):
                stacked = None if value is None else value.detach().expand(config.num_experts, *value.shape).clone()
                self.register_parameter(f"{name}_{part}", None if stacked is None else nn.Parameter(stacked))

    def forward(self, tokens: Tensor, choice: Choice, mlp: PlainMLP) -> Tensor:
        """Tokens [n, D] -> [n, D]."""

        def run(part: Tensor, product: Product) -> Tensor:
            hidden = mlp.activation(product(part, self.first_weight, self.first_bias))
            return product(dropout(hidden, self.rate, self.training), self.second_weight, self.second_bias)

        return run_experts(tokens, choice, run)


class LowRankExperts(nn.Module):
    """Experts that share one MLP and each add a low-rank update to its two Linear modules; updates start at zero.

    The second Linear is shared, so it runs once, on the weighted sum of the experts' hidden states of a token.

    Args:
        width: D.
        hidden_width: F.
        config: Configuration of the mixture.
        like: A tensor whose dtype and device the experts get.
    """

    first_lora_A: Tensor  # noqa: N815
    first_lora_B: Tensor  # noqa: N815
    second_lora_A: Tensor  # noqa: N815
    second_lora_B: Tensor  # noqa: N815

    def __init__(self, width: int, hidden_width: int, config: MoEConfig, like: Tensor) -> None:
        super().__init__()
        self.rate, self.scaling, self.width = config.dropout, config.lora_alpha / config.r, width
        for name, (inner, outer) in {"first": (width, hidden_width), "second": (hidden_width, width)}.items():
            down = like.new_empty(config.num_experts, config.r, inner, requires_grad=False)
            nn.init.uniform_(down, -(inner**-0.5), inner**-0.5)
            up = like.new_zeros(config.num_experts, outer, config.r, requires_grad=False)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(down))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(up))

    def forward(self, tokens: Tensor, choice: Choice, mlp: PlainMLP) -> Tensor:
        """Tokens [n, D] -> [n, D]."""
        shared = mlp.first(tokens)
        shared = shared.to(tokens.dtype) if not torch.is_autocast_enabled(tokens.device.type) else shared

        def run(part: Tensor, product: Product) -> Tensor:
            own, shared = part.split([self.width, part.shape[-1] - self.width], dim=-1)
            update = product(product(own, self.first_lora_A, None), self.first_lora_B, None) * self.scaling
            hidden = dropout(mlp.activation(shared + update), self.rate, self.training)
            update = product(product(hidden, self.second_lora_A, None), self.second_lora_B, None) * self.scaling
            return torch.cat([hidden, update], dim=-1)

        both = run_experts(torch.cat([tokens, shared.to(tokens.dtype)], dim=1), choice, run)
        hidden, update = both.split([both.shape[1] - self.width, self.width], dim=1)
        output: Tensor = mlp.second(hidden) + update
        return output


class Mixture(nn.Module):
    """A gate for each task, and experts that all tasks share.

    Args:
        experts: The experts.
        num_tasks: T.
        width: D.
        config: Configuration of the mixture.
        like: A tensor whose dtype and device the gates get.
    """

    def __init__(
        self, experts: FullExperts | LowRankExperts, num_tasks: int, width: int, config: MoEConfig, like: Tensor
    ) -> None:
        super().__init__()
        self.settings = config
        self.experts = experts
        self.gates = nn.Parameter(new_gates(num_tasks, config.num_experts, width, like))

    def forward(self, tokens: Tensor, call: TaskCall, index: int, mlp: PlainMLP) -> Tensor:
        """Run the experts, and store balance loss and usage in `call` for the end of the forward.

        Args:
            tokens: [B, N, D], after the block's norm.
            call: Tasks of the images.
            index: Index of the block.
            mlp: The block's own MLP.

        Returns:
            [B, N, D].
        """
        settings = self.settings
        logits = gate_logits(tokens, self.gates, call.tasks).flatten(0, 1)
        if self.training and settings.noise:
            logits = logits + torch.randn_like(logits) * (settings.noise / settings.num_experts)
        choice = choose_experts(logits, settings.top_k, settings.renormalize)
        if self.training and settings.balance_weight:
            balance = balance_loss(choice)  # also in a recomputation, which must save the same tensors
            if call.is_open:
                call.balance[index] = balance
        if call.is_open and call.usage is not None:
            call.usage[index] = _usage(choice, call.tasks, tokens.shape, self.gates.shape[0])
        return self.experts(tokens.flatten(0, 1), choice, mlp).unflatten(0, tokens.shape[:2])


def new_gates(num_tasks: int, num_experts: int, width: int, like: Tensor) -> Tensor:
    """Gates [T, E, D] initialized as `nn.Linear`: logits of normed tokens have a standard deviation of about 0.6."""
    gates = torch.empty(num_tasks, num_experts, width, dtype=like.dtype, device=like.device)
    return nn.init.uniform_(gates, -(width**-0.5), width**-0.5)


def _usage(choice: Choice, tasks: int | Tensor, shape: torch.Size, num_tasks: int) -> Tensor:
    """Tokens of each task and expert, [T, E] int64."""
    batch, length, _ = shape
    num_experts, device = choice.probabilities.shape[1], choice.experts.device
    of_images = torch.full((batch,), tasks, device=device) if isinstance(tasks, int) else tasks
    of_tokens = of_images[:, None].expand(batch, length).reshape(-1, 1)
    places = (of_tokens * num_experts + choice.experts).flatten()
    counts = places.new_zeros(num_tasks * num_experts)  # bincount would make the host wait
    return counts.scatter_add(0, places, torch.ones_like(places)).view(num_tasks, num_experts)


__all__ = ["FullExperts", "LowRankExperts", "Mixture", "PlainMLP", "new_gates"]
