"""Measure SynQT: parameters, saved activations, step times relative to full fine-tuning, the cache on disk.

    python benchmarks/synqt.py                   # all of it, about 3 minutes on 2 cores
    python benchmarks/synqt.py parameters saved  # parts of it

ViT-B/16, 224 px, fp32. The weights are random; they do not affect these figures.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import FeatureCache, SynQTConfig
from peft_bsr.cost import TrainingStep, count_flops, saved_activations

warnings.filterwarnings("ignore", category=FutureWarning)

CLASSES = 10
PARAMETERS = {1: 2_622_866, 4: 2_650_514, 16: 2_761_106}
SAVED_MIB = {1: 8.4, 4: 11.3, 16: 22.6}
REDUCED = {"keep_rate": 0.5, "reduction_blocks": [3, 6, 9]}
REDUCED_MIB = 5.0
STEP_RATIO, CACHE_RATIO = 0.50, 0.15


def main() -> None:
    """Run the chosen parts."""
    parts: dict[str, Callable[[argparse.Namespace], str]] = {"parameters": parameters, "saved": saved, "time": times}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {list(parts)}, default all")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating steps of each method (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts) - set(parts)):
        parser.error(f"unknown parts {unknown}; there are {list(parts)}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{device}, fp32, torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    for name in args.parts or parts:
        print(f"## {name}\n\n{parts[name](args)}\n", flush=True)


def parameters(args: argparse.Namespace) -> str:
    """Trainable parameters without the classifier."""
    rows = [["T", "trainable without classifier", "a class"]]
    for num_queries, expected in PARAMETERS.items():
        found = synqt(num_queries=num_queries).get_nb_trainable_parameters()[0] - 769 * CLASSES
        rows.append([str(num_queries), f"{found:,} ({'met' if found == expected else f'MISSED, {expected:,}'})", "769"])
    return table(rows)


def saved(args: argparse.Namespace) -> str:
    """Saved activations, with their bars."""
    rows = [["T", "tokens", "full", "bfloat16", "int8"]]
    for num_queries, bar in SAVED_MIB.items():
        for label, settings, limit in (
            ("all", {}, bar),
            ("halved at {3,6,9}", REDUCED, REDUCED_MIB if num_queries == 1 else None),
        ):
            cells = []
            for kept in ("full", "bfloat16", "int8"):
                model = synqt(num_queries=num_queries, kept_tokens=kept, **settings).to(args.device)
                batch = random_batch(2, args.device)
                mib = saved_activations(model, lambda m=model, b=batch: m(**b).loss) / 2 / 2**20
                cells.append(verdict(f"{mib:.2f}", mib, limit if kept == "full" else None))
            rows.append([str(num_queries), label, *cells])
    return (
        table(rows)
        + "\n\nMiB per image kept for backward in training mode, each storage once, batch 2; by `kept_tokens`."
    )


def times(args: argparse.Namespace) -> str:
    """Step times from images and from the cache, relative to full fine-tuning."""
    torch.manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 224, 224), "labels": i % CLASSES} for i in range(args.batch_size)]
    models = {"all tokens": synqt(num_queries=4), "halved at {3,6,9}": synqt(num_queries=4, **REDUCED)}
    full = vit().train().to(args.device)
    steps = {"full fine-tuning": TrainingStep(full, random_batch(args.batch_size, args.device))}
    disk: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.to(args.device)
            cache = FeatureCache.build(model, images, Path(folder) / name, progress=False)
            disk[name] = f"{(Path(folder) / name / 'cached_tokens.bin').stat().st_size / len(images) / 2**20:.2f}"
            steps[f"SynQT, {name}"] = TrainingStep(model, random_batch(args.batch_size, args.device))
            cached = {key: value.to(args.device) for key, value in next(iter(DataLoader(cache, len(images)))).items()}
            steps[f"SynQT, {name}, from the cache"] = CachedStep(model, cached, cache)
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step.seconds()
        for _ in range(args.rounds):  # in turn: other load on the machine affects all alike
            for name, step in steps.items():
                taken[name].append(step.seconds())
        flops = {name: count_flops(step) for name, step in steps.items()}
    first = "full fine-tuning"
    rows = [["T = 4", "step, s", "to full fine-tuning", "FLOPs, to full", "MiB per image on disk"]]
    for name, values in taken.items():
        seconds = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(values, taken[first], strict=True))
        bar = None if name == first else CACHE_RATIO if "cache" in name else STEP_RATIO
        kept = disk[name.split(", ")[1]] if "cache" in name else ""
        rows.append(
            [name, f"{seconds:.2f}", verdict(f"{ratio:.3f}", ratio, bar), f"{flops[name] / flops[first]:.3f}", kept]
        )
    return table(rows) + (
        f"\n\nForward, backward and SGD update; median of {args.rounds} in turn, ratios that of the rounds; batch "
        f"{args.batch_size}. The cache is in bf16; reading it is not in the step."
    )


class CachedStep(TrainingStep):
    """A training step on a batch of cached tokens.

    Args:
        model: Model of the cache.
        batch: Batch of the cache.
        cache: Cache that the model reads during the step.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], cache: FeatureCache) -> None:
        super().__init__(model, batch)
        self.reading = cache.read_by(model)
        self.reading.__enter__()


def vit() -> nn.Module:
    """ViT-B/16, always with the same weights."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


def synqt(**settings: object) -> peft.PeftModel:
    """ViT-B/16 with SynQT, in training mode."""
    return get_peft_model(vit(), SynQTConfig(**settings)).train()


def random_batch(batch_size: int, device: str) -> dict[str, Tensor]:
    """Images and labels."""
    labels = torch.arange(batch_size, device=device) % CLASSES
    return {"pixel_values": torch.randn(batch_size, 3, 224, 224, device=device), "labels": labels}


def verdict(text: str, value: float, bar: float | None) -> str:
    """The text, and whether the value meets its bar."""
    return text if bar is None else f"{text} ({'met' if value <= bar else f'MISSED, bar {bar}'})"


def table(rows: list[list[str]]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    main()
