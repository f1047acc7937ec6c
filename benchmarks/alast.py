"""ALaST and full fine-tuning on ViT-B/16: saved activations, FLOPs and step time, means over many draws.

    python benchmarks/alast.py [--batch-size 8] [--draws 12] [--device cuda]

Random weights, initial budgets. Bars, as shares of full fine-tuning: preset "paper" saved 0.60,
FLOPs 0.60, time 0.70; the default saved 0.35.
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import ALaSTConfig
from peft_bsr.cost import TrainingStep, count_flops, saved_activations

warnings.filterwarnings("ignore", category=FutureWarning)

CONFIGS = {
    'preset "paper"': ALaSTConfig(preset="paper", alpha=0.0),
    'preset "paper", stock blocks': ALaSTConfig(preset="paper", alpha=0.0, lean="off"),
    "default (lean exact)": ALaSTConfig(alpha=0.0),
    "default, stock blocks": ALaSTConfig(alpha=0.0, lean="off"),
    "default, lean max": ALaSTConfig(alpha=0.0, lean="max"),
    'selection "sample"': ALaSTConfig(alpha=0.0, selection="sample"),
    "low-rank": ALaSTConfig(alpha=0.0, trainable="lora"),
}
BARS = {'preset "paper"': (0.60, 0.60, 0.70), "default (lean exact)": (0.35, None, None)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--draws", type=int, default=12, help="measured steps (default 12)")
    parser.add_argument("--only", nargs="*", help="these rows (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    args = parser.parse_args()

    def vit() -> nn.Module:
        return ViTForImageClassification(ViTConfig(num_labels=10)).to(args.device).train()

    batch = {
        "pixel_values": torch.randn(args.batch_size, 3, 224, 224, device=args.device),
        "labels": torch.randint(10, (args.batch_size,), device=args.device),
    }
    full = vit()
    whole = TrainingStep(full, batch)
    references = (saved_activations(full, whole.forward), count_flops(whole))
    print("| ALaST | saved, MiB per image | to full | FLOPs to full | step to full |\n|---|---|---|---|---|")
    for name, config in ((name, config) for name, config in CONFIGS.items() if name in (args.only or CONFIGS)):
        model = get_peft_model(vit(), config).train()
        found = measure(model, batch, whole, references, args.draws)
        bars = BARS.get(name, (None, None, None))
        cells = [verdict(value, bar) for value, bar in zip(found, bars, strict=True)]
        saved = found[0] * references[0] / args.batch_size / 2**20
        print(f"| {name} | {saved:.1f} | {' | '.join(cells)} |", flush=True)
    print(
        f"\nViT-B/16, 224 px, fp32, batch {args.batch_size}, {args.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; means over {args.draws} draws, steps timed in turn with full fine-tuning, median ratio."
    )


def measure(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    whole: TrainingStep,
    references: tuple[int, int],
    draws: int,
) -> tuple[float, float, float]:
    """Saved activations, FLOPs and time of a step, as shares of full fine-tuning's."""
    step, schedule = TrainingStep(model, batch), model.base_model.schedule()
    step.seconds()
    saved, flops, ratios = [], [], []
    for _ in range(draws):
        schedule.next_step()
        saved.append(saved_activations(model, step.forward))
        flops.append(count_flops(step))
        ratios.append(step.seconds() / whole.seconds())
    return statistics.mean(saved) / references[0], statistics.mean(flops) / references[1], statistics.median(ratios)


def verdict(value: float, bar: float | None) -> str:
    """The value, and whether it meets the bar."""
    return f"{value:.2f}" if bar is None else f"{value:.2f} ({'met' if value <= bar else 'MISSED'}, {bar:.2f})"


if __name__ == "__main__":
    main()
