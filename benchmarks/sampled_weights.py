"""Would sampled rows of weight gradients (WTA-CRS, 2305.15265) make a lean step faster? A prototype, not an option yet.

    python benchmarks/sampled_weights.py

Each weight gradient of the lean blocks is computed from a share of its rows: the largest ones, and others drawn by
their norms and scaled (unbiased). A lean backward has both input and gradient, so true norms are used instead of the
paper's table of earlier norms. Saved activations do not change: nothing is kept for weight gradients alone. Printed:
step time relative to the exact step (alternating steps), and the error of the gradient of one batch.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Sequence
from unittest import mock

import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.ops import LinearOp
from peft_bsr.ops.linear import LinearGrads

SHARES = (1.0, 0.5, 0.3, 0.1)
_EXACT = LinearOp.parameter_grads


def sampled_product(gradient: Tensor, inputs: Tensor, share: float) -> Tensor:
    """Estimate `gradient.T @ inputs` from `share` of the rows; its mean over many draws is exact.

    Args:
        gradient: [M, E].
        inputs: [M, D].
        share: Share of the rows, above 0 and below 1.

    Returns:
        [E, D].
    """
    rows, factors = draw_rows(_norms(gradient) * _norms(inputs), math.ceil(share * gradient.shape[0]))
    return (gradient[rows] * factors[:, None]).T @ inputs[rows]


def draw_rows(norms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of `count` rows and their weights, from the norms [M] of all rows.

    The C largest are taken, the others drawn with replacement. C minimizes `(1 - P_C) / (count - C)`, where P_C is
    the share of the C largest in the sum of all norms.
    """
    chances, order = (norms / norms.sum()).sort(descending=True)
    places = torch.arange(len(norms))
    rest = (1 - chances.cumsum(0) + chances)[:count]  # 1 - P_C for C = 0 .. count - 1
    largest = int((rest / (count - places[:count])).argmin())
    drawn = torch.multinomial(torch.where(places < largest, 0.0, chances), count - largest, replacement=True)
    factors = rest[largest] / ((count - largest) * chances[drawn])
    return order[torch.cat([places[:largest], drawn])], torch.cat([torch.ones(largest), factors])


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def sampled_grads(share: float) -> mock._patch[object]:
    """Context in which the backward of lean blocks samples rows."""

    def parameter_grads(
        self: LinearOp, gradient: Tensor, hidden_grad: Tensor | None, inputs: Tensor | None, needs: Sequence[bool]
    ) -> LinearGrads:
        if share == 1 or not needs[0] or inputs is None:
            return _EXACT(self, gradient, hidden_grad, inputs, needs)
        others = _EXACT(self, gradient, hidden_grad, inputs, (False, *needs[1:]))
        return sampled_product(gradient, inputs, share), *others[1:]

    return mock.patch.object(LinearOp, "parameter_grads", parameter_grads)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="default 8")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per share (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(num_labels=10))
    model: nn.Module = get_peft_model(vit, BSRConfig(trainable_blocks="every:1", keep_rate=1.0)).train()
    images, labels = torch.randn(args.batch_size, 3, 224, 224), torch.arange(args.batch_size) % 10

    def step(share: float) -> tuple[float, Tensor]:
        with sampled_grads(share):
            start = time.perf_counter()
            model(pixel_values=images, labels=labels).loss.backward()
            seconds = time.perf_counter() - start
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return seconds, found

    _, exact = step(1.0)
    times: dict[float, list[float]] = {share: [] for share in SHARES}
    errors = {}
    for _ in tqdm(range(args.steps), unit="round"):
        for share in SHARES:
            seconds, found = step(share)
            times[share].append(seconds)
            errors[share] = float((found - exact).norm() / exact.norm())
    print(
        f"ViT-B/16, every block whole, lean exact, fp32, batch {args.batch_size}, 1 thread, torch {torch.__version__},"
    )
    print(f"CPU ({platform.machine()}), random weights; forward and backward, median of {args.steps} in turn\n")
    print("| share of the rows | step | error of the gradient |\n|---|---|---|")
    base = statistics.median(times[1.0])
    for share in SHARES:
        print(f"| {share:.1f} | {statistics.median(times[share]) / base:.2f} | {errors[share]:.2f} |")


if __name__ == "__main__":
    main()
