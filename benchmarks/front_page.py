"""Peak memory, step time and accuracy of the main choices, as on the front page.

    python benchmarks/front_page.py --batch-size 8   # prints the table, 20 minutes on 2 idle cores
    python benchmarks/front_page.py --device cuda --batch-size 32

Memory and time: ViT-B/16 at 224 px, random weights, AdamW. Each method runs in new processes, in turn with the
others: one for the step time (median of its steps), one for the peak, where glibc returns freed tensors at once.
Accuracy: from the committed runs of `benchmarks/method_comparison` (ViT-Ti, see docs/benchmarks.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from own_process import in_own_process
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.cost import PeakMemory

ROUNDS = 3  # new processes per method
STEPS = 4  # timed steps, after a warm-up step
FULL = "full fine-tuning"
RESULTS = Path(__file__).parent / "method_comparison" / "results" / "cpu"
TASKS = {"cifar10": "CIFAR-10, %", "fashion-mnist": "Fashion-MNIST, %"}


def _probe(model: Any) -> nn.Module:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def _lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))


def _checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _bsr(**settings: Any) -> Callable[[Any], nn.Module]:
    return lambda model: get_peft_model(model, BSRConfig(**settings))


# name -> (how it is attached, the experiment whose accuracy it has)
METHODS: dict[str, tuple[Callable[[Any], nn.Module], str]] = {
    FULL: (lambda model: model, "full_finetuning/all"),
    "linear probe": (_probe, "linear_probe/head"),
    "LoRA, q and v": (_lora, "lora/qv"),
    "LoRA, q and v, checkpointing": (lambda model: _checkpointed(_lora(model)), "lora/qv"),
    "`BSRConfig()`, the paper's plan": (_bsr(), "bsr/spread-exact"),
    "`BSRConfig(trainable_blocks=[5, 8, 11], keep_rate=0.7)`": (
        _bsr(trainable_blocks=[5, 8, 11], keep_rate=0.7),
        "bsr/upper-exact",
    ),
    '`BSRConfig(trainable="lora", trainable_blocks="every:1", keep_rate=1.0, lean="max")`': (
        _bsr(trainable="lora", trainable_blocks="every:1", keep_rate=1.0, lean="max"),
        "bsr/all-lora-max",
    ),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (default 16)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"new processes per method (default {ROUNDS})")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model (default 12; fewer for a test)")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    common = ("--batch-size", args.batch_size, "--device", args.device, "--layers", args.layers)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(args.rounds):
        for name, runs in found.items():
            seconds = in_own_process(__file__, "--worker", name, *common, gapless=False)["seconds"]
            runs.append({"seconds": seconds, "peak": in_own_process(__file__, "--worker", name, *common)["peak"]})
    print(table(found))
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()})"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"\n{device}, {torch.get_num_threads()} threads, fp32, ViT-B/16, 224 px, batch {args.batch_size}, AdamW, "
        f"{versions}; median of {args.rounds} new processes and their range."
    )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds per step, and the process's peak in MiB, including weights and optimizer."""
    torch.manual_seed(0)
    attach, _ = METHODS[args.worker]
    model = attach(ViTForImageClassification(ViTConfig(num_labels=10, num_hidden_layers=args.layers))).to(args.device)
    model.train()
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    labels = torch.randint(10, (args.batch_size,), device=args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    taken = []
    with PeakMemory(args.device) as memory:
        for _ in range(1 + STEPS):
            begin = time.perf_counter()
            model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if args.device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(taken[1:]), "peak": memory.peak_bytes / 2**20}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown table; ratios are relative to full fine-tuning in the same round."""
    lines = [
        f"| | peak memory, MiB | step, s | to full | {' | '.join(TASKS.values())} |",
        f"|---|---|---|---|{'---|' * len(TASKS)}",
    ]
    for name, runs in found.items():
        ratios = [own["seconds"] / full["seconds"] for own, full in zip(runs, found[FULL], strict=True)]
        cells = [
            spread([run["peak"] for run in runs], "{:.0f}"),
            spread([run["seconds"] for run in runs], "{:.2f}"),
            spread(ratios, "{:.2f}"),
            *(accuracy(task, METHODS[name][1]) for task in TASKS),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], form: str) -> str:
    """Median and range, or one number if they are equal as printed."""
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def accuracy(task: str, experiment: str) -> str:
    """Mean over the committed seeds, and their number if it is not three."""
    paths = sorted((RESULTS / task / experiment.replace("/", "--")).glob("seed-*.json"))
    scores = [json.loads(path.read_text())["train_info"]["metrics"][0]["accuracy"] for path in paths]
    note = "" if len(scores) == 3 else f" ({len(scores)} seed{'s' if len(scores) > 1 else ''})"
    return f"{100 * statistics.mean(scores):.1f}{note}"


if __name__ == "__main__":
    main()
