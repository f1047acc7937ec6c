"""Time of grouped dispatch relative to the ideal, and of a mixed batch relative to a batch of one task.

    python benchmarks/experts.py          # one mixture layer, then a whole model; about 3 minutes on one core
    python benchmarks/experts.py model

16 experts, top 4, forward and backward, fp32; the layer is ViT-S's, the model ViT-S with three tasks and the defaults
of `BSRConfig`, in training. The ideal replaces each mixture by four dense MLPs. Times are processor time of one thread,
minimum of several alternating runs, so other processes on the machine hardly affect them. Bars: 1.3 and 1.15.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, MoEConfig
from peft_bsr.core import Choice, TaskCall
from peft_bsr.multitask import FullExperts, Mixture, PlainMLP

IDEAL, SINGLE, MIXED = "4 dense MLPs", "mixture, one task", "mixture, three tasks"
CONFIG = MoEConfig(num_experts=16, top_k=4)
WIDTH, HIDDEN, TOKENS = 384, 1536, 197
Runs = dict[str, Callable[[], object]]


class DenseMLPs(nn.Module):
    """`top_k` MLPs, each on all tokens: the cost of a mixture if routing were free."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(CONFIG.top_k)
        )

    def forward(self, tokens: Tensor, choice: Choice | None = None, mlp: PlainMLP | None = None) -> Tensor:
        """Mean of the MLPs, [..., width] -> [..., width]; `choice` and `mlp` are not used."""
        return torch.stack([layer(tokens) for layer in self.mlps]).mean(0)


def layer_runs(batch: int) -> Runs:
    """Forward and backward of a single mixture."""
    first, second = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
    mlp, dense = PlainMLP(first, nn.GELU(), second), DenseMLPs(WIDTH, HIDDEN)
    experts = FullExperts((first.weight, first.bias), (second.weight, second.bias), CONFIG)
    mixture = Mixture(experts, 3, WIDTH, CONFIG, first.weight)
    tokens = torch.randn(batch, TOKENS, WIDTH, requires_grad=True)
    return {
        IDEAL: lambda: dense(tokens).sum().backward(),
        SINGLE: lambda: mixture(tokens, TaskCall(1), 0, mlp).sum().backward(),
        MIXED: lambda: mixture(tokens, TaskCall(torch.arange(batch) % 3), 0, mlp).sum().backward(),
    }


def model_runs(batch: int) -> Runs:
    """A whole model in training."""
    images, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch) % 10
    sizes = {"hidden_size": WIDTH, "num_attention_heads": WIDTH // 64, "intermediate_size": HIDDEN}
    models = {}
    for name in (IDEAL, SINGLE):
        config = BSRConfig(tasks={"a": 10, "b": 10, "c": 10}, moe=CONFIG)
        models[name] = get_peft_model(ViTForImageClassification(ViTConfig(**sizes)), config).train()
    for mixture in [module for module in models[IDEAL].modules() if isinstance(module, Mixture)]:
        mixture.experts = DenseMLPs(WIDTH, HIDDEN)

    def step(name: str, tasks: list[int]) -> Callable[[], object]:
        return lambda: models[name](pixel_values=images, task_ids=tasks, labels=labels).loss.backward()

    one, three = [1] * batch, [index % 3 for index in range(batch)]
    return {IDEAL: step(IDEAL, one), SINGLE: step(SINGLE, one), MIXED: step(SINGLE, three)}


def least_seconds(runs: Runs, repeats: int) -> dict[str, float]:
    """Minimum time of each, after a warm-up run."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: min(seconds[1:]) for name, seconds in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["layer", "model"], help='"layer" and "model" (default both)')
    parser.add_argument("--batch", type=int, default=12, help="images (default 12)")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"1 thread, torch {torch.__version__}, batch {args.batch}, minimum of {args.repeats}")
    for part in args.parts:
        torch.manual_seed(0)
        seconds = least_seconds({"layer": layer_runs, "model": model_runs}[part](args.batch), args.repeats)
        for name, value in seconds.items():
            print(f"{part}: {name:22} {1e3 * value:8.1f} ms  {value / seconds[IDEAL]:.2f} of the ideal")
        print(f"{part}: mixed / single task: {seconds[MIXED] / seconds[SINGLE]:.2f}")


if __name__ == "__main__":
    main()
