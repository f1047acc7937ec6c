"""Time of grouped dispatch against the ideal, and of a mixed batch against one of a single task.

    python benchmarks/experts.py

One mixture layer (16 experts, top 4), forward and backward, fp32; the least of several interleaved runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from peft_bsr import MoEConfig
from peft_bsr.core import TaskCall
from peft_bsr.multitask import FullExperts, Mixture, PlainMLP


def least_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least time of each, taken in turn so that a busy machine is busy for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="default 384, ViT-S")
    parser.add_argument("--batch", type=int, default=12, help="images (default 12)")
    parser.add_argument("--tokens", type=int, default=197, help="of an image (default 197)")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    args = parser.parse_args()
    torch.manual_seed(0)
    first, second = nn.Linear(args.width, 4 * args.width), nn.Linear(4 * args.width, args.width)
    mlp, config = PlainMLP(first, nn.GELU(), second), MoEConfig(16, 4)
    experts = FullExperts((first.weight, first.bias), (second.weight, second.bias), config)
    mixture = Mixture(experts, 3, args.width, config, first.weight)
    dense = [nn.Sequential(nn.Linear(args.width, 4 * args.width), nn.GELU(), nn.Linear(4 * args.width, args.width))
             for _ in range(4)]  # fmt: skip
    tokens = torch.randn(args.batch, args.tokens, args.width, requires_grad=True)

    def of_tasks(tasks: int | torch.Tensor) -> Callable[[], object]:
        return lambda: mixture(tokens, TaskCall(tasks), 0, mlp).sum().backward()

    runs = {
        "4 dense MLPs": lambda: torch.stack([layer(tokens).sum() for layer in dense]).sum().backward(),
        "mixture, one task": of_tasks(1),
        "mixture, three tasks": of_tasks(torch.arange(args.batch) % 3),
    }
    seconds = least_seconds(runs, args.repeats)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {vars(args)}")
    for name, value in seconds.items():
        print(f"{name:22} {1e3 * value:8.1f} ms  {value / seconds['4 dense MLPs']:.2f}")
    print(f"mixed / single task: {seconds['mixture, three tasks'] / seconds['mixture, one task']:.2f}")


if __name__ == "__main__":
    main()
