"""Measure what lean blocks promise: saved activations, gradients, step times, resident memory.

    python benchmarks/lean.py                        # all of it, about 20 minutes on 2 cores
    python benchmarks/lean.py saved gradients        # parts of it
    python benchmarks/lean.py convergence --data FOLDER

Parts: `saved`, `side` (LoSA's side network), `gradients`, `time`, `lora` (PEFT's on every Linear, and ours), `cache`,
`memory` (20 AdamW steps of each method in a new process), and with `--data`, `convergence` (200 steps of ViT-Ti on
CIFAR-10; FOLDER contains `vit-tiny-patch16-224` and `cifar10-train-5000.parquet`). ViT-B/16, 224 px, fp32, random
weights unless noted; of these figures they affect only the gradient errors.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from own_process import in_own_process
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTForImageClassification,
)

from peft_bsr import BSRConfig, FeatureCache, LoSAConfig
from peft_bsr.backbones import probe_inputs, tensors_of
from peft_bsr.cost import PeakMemory, TrainingStep, compare, cost_table, count_flops, estimate, saved_activations

warnings.filterwarnings("ignore", category=FutureWarning)

LEVELS = {
    "stock": {"lean": "off"},
    "exact": {"lean": "exact"},
    "max": {"lean": "max"},
    "exact, int8": {"lean": "exact", "saved_activations": "int8"},
    "max, int8": {"lean": "max", "saved_activations": "int8"},
}
PLANS = {
    "{3,7,11}, reduce {3,6,9}": {},
    "last 4, reduce after 7": {"trainable_blocks": "last:4", "reduction_blocks": [7], "reduce_at": "after_block"},
    "{9,10,11}, reduce {8}": {"trainable_blocks": "last:3", "reduction_blocks": [8]},
    "{9,10,11}, reduce {3,6,9}": {"trainable_blocks": "last:3"},
    "all blocks, all tokens": {"trainable_blocks": "every:1", "reduction_blocks": []},
    "LoRA in all blocks, all tokens": {"trainable_blocks": "every:1", "reduction_blocks": [], "trainable": "lora"},
}
GRADIENT_TOKENS = {
    f"{plan.partition(',')[0]}, gradients of {share:g}": {**PLANS[plan], "gradient_tokens": share}
    for plan in ("all blocks, all tokens", "LoRA in all blocks, all tokens")
    for share in (0.5, 0.3)
}
BARS_MIB = {
    ("{3,7,11}, reduce {3,6,9}", "exact"): 18.5,
    ("{3,7,11}, reduce {3,6,9}", "max"): 6.5,
    ("{3,7,11}, reduce {3,6,9}", "exact, int8"): 5.2,
    ("{3,7,11}, reduce {3,6,9}", "max, int8"): 2.2,
    ("last 4, reduce after 7", "exact"): 9.7,
    ("last 4, reduce after 7", "max"): 5.0,
    ("{9,10,11}, reduce {3,6,9}", "exact"): 2.6,
    ("all blocks, all tokens", "max"): 30.0,
    ("all blocks, gradients of 0.5", "stock"): 64.8,
    ("all blocks, gradients of 0.5", "exact"): 40.2,
    ("all blocks, gradients of 0.5", "max"): 13.4,
    ("all blocks, gradients of 0.3", "stock"): 44.6,
    ("all blocks, gradients of 0.3", "exact"): 29.9,
    ("all blocks, gradients of 0.3", "max"): 10.82,
}
SIDE = {
    "LoSA, all blocks": ({}, 6.9),
    "LoSA, all blocks, int8": ({"kept_tokens": "int8"}, 1.9),
    "LoSA, every fourth block": ({"layers": "every:4"}, 1.7),
    "LoSA, every fourth block, int8": ({"layers": "every:4", "kept_tokens": "int8"}, 0.5),
}
SMALL = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
SMALL |= {"image_size": 96, "patch_size": 16}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "B: ViT": lambda: ViTForImageClassification(ViTConfig(**SMALL)),
    "C: DINOv2": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL)),
    "D: DINOv3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL)),
    "A: CLIP": lambda: CLIPVisionModel(CLIPVisionConfig(**SMALL)),
    "A: SigLIP": lambda: SiglipVisionModel(SiglipVisionConfig(**SMALL)),
    "E: VideoMAE": lambda: VideoMAEModel(VideoMAEConfig(**SMALL, num_frames=2)),
    "BEiT": lambda: BeitForImageClassification(BeitConfig(**SMALL, drop_path_rate=0.0)),
}


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="default: all parts, `convergence` only with --data")
    parser.add_argument("--data", type=Path, help="folder with real weights and images")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each method in `memory` (default 20)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(train_in_this_process(args.worker, args)))
        return
    parts: dict[str, Callable[[Any], str]] = {
        "saved": saved,
        "side": side,
        "gradients": gradients,
        "time": times,
        "lora": low_rank,
        "cache": cache_epoch,
        "memory": memory,
        "convergence": convergence,
    }
    chosen = args.parts or [name for name in parts if name != "convergence" or args.data]
    if unknown := sorted(set(chosen) - set(parts)):
        parser.error(f"unknown parts {unknown}; there are {list(parts)}")
    if "convergence" in chosen and not args.data:
        parser.error("convergence trains on real images: give --data FOLDER")
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{device}, fp32, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    for name in chosen:
        print(f"## {name}\n\n{parts[name](args)}\n", flush=True)


def saved(args: argparse.Namespace) -> str:
    """Saved activations of every plan at every level, with their bars."""
    rows = [["plan", *LEVELS]]
    for plan, settings in (PLANS | GRADIENT_TOKENS).items():
        cells = []
        for level, lean in LEVELS.items():
            model = bsr(args.device, **settings, **lean)
            batch = random_batch(2, args.device)
            mib = saved_activations(model, lambda m=model, b=batch: m(**b).loss) / 2 / 2**20
            cells.append(verdict(f"{mib:.2f}", mib, BARS_MIB.get((plan, level))))
        rows.append([plan, *cells])
    return table(rows) + "\n\nMiB per image kept for backward, each storage once, parameters excluded; batch 2."


def side(args: argparse.Namespace) -> str:
    """Saved activations of LoSA, measured and estimated, with their bars."""
    rows = [["side network", "kept", "estimated", "trained, without norm and head"]]
    for name, (settings, bar) in SIDE.items():
        config, batch = LoSAConfig(**settings), random_batch(2, args.device)
        expected = estimate(vit(args.device), config, batch_size=2).saved_bytes / 2 / 2**20
        model = get_peft_model(vit(args.device), config).train()
        mib = saved_activations(model, lambda m=model, b=batch: m(**b).loss) / 2 / 2**20
        trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".token_router." in n)
        rows.append([name, verdict(f"{mib:.2f}", mib, 1.03 * bar), f"{expected:.2f}", f"{trained:,}"])
    return table(rows) + "\n\nMiB per image kept for backward, each storage once, parameters excluded; batch 2."


def gradients(args: argparse.Namespace) -> str:
    """Relative error of all gradients against stock blocks, by norm."""
    rows = [["family", "exact", "max", "exact, int8", "max, int8", "stock in bf16", "exact in bf16", "max in bf16"]]
    for family, make in FAMILIES.items():
        expected = all_gradients(make, args.device, torch.float32, lean="off")
        cells = []
        for level in ("exact", "max", "exact, int8", "max, int8"):
            error = distance(all_gradients(make, args.device, torch.float32, **LEVELS[level]), expected)
            cells.append(verdict(f"{error:.1e}", error, 0.02 if "int8" in level else 1e-5))
        rounding = distance(all_gradients(make, args.device, torch.bfloat16, lean="off"), expected)
        cells.append(f"{rounding:.1e}")
        for level in ("exact", "max"):
            error = distance(all_gradients(make, args.device, torch.bfloat16, **LEVELS[level]), expected)
            cells.append(verdict(f"{error:.1e}", error, 1.1 * rounding))
        rows.append([family, *cells])
    return table(rows) + (
        "\n\n|gradients - those of the stock path in fp32| / |those of the stock path in fp32|, all trained weights "
        "together; 12 blocks of width 192, 96 px, batch 4. bf16 = weights and activations."
    )


def times(args: argparse.Namespace) -> str:
    """Step times of the levels, relative to a stock BSR step and a full fine-tuning step."""
    models = {"full fine-tuning": vit(args.device).train()}
    models |= {f"BSR {level}": bsr(args.device, **lean) for level, lean in LEVELS.items()}
    batch = random_batch(args.batch_size, args.device)
    steps = {name: TrainingStep(model, batch) for name, model in models.items()}
    for step in steps.values():
        step.seconds()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(7):  # in turn: other load on the machine affects all alike
        for name, step in steps.items():
            taken[name].append(step.seconds())
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    full, stock = seconds["full fine-tuning"], seconds["BSR stock"]
    bars = {"BSR exact": (1.03, 0.32), "BSR max": (1.20, None)}
    rows = [["method", "step, s", "to BSR stock", "to full fine-tuning"]]
    for name, value in seconds.items():
        bar = bars.get(name, (None, None))
        rows.append([name, f"{value:.2f}"])
        rows[-1] += [
            verdict(f"{value / base:.3f}", value / base, b) for base, b in zip((stock, full), bar, strict=True)
        ]
    return table(rows) + f"\n\nForward, backward and SGD update, median of 7 alternating runs; batch {args.batch_size}."


def low_rank(args: argparse.Namespace) -> str:
    """Low-rank updates on every Linear: PEFT's own, and ours on lean blocks."""
    plan = PLANS["LoRA in all blocks, all tokens"]
    peer = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["classifier"])
    models = {
        "full fine-tuning": vit(args.device),
        "PEFT's LoRA": get_peft_model(vit(args.device), peer),
        "PEFT's LoRA, checkpointing": checkpointing(get_peft_model(vit(args.device), peer)),
    }
    models |= {f"LoRA, {level}": bsr(args.device, **plan, **LEVELS[level]) for level in ("stock", "exact", "max")}
    batch = random_batch(args.batch_size, args.device)
    return cost_table(compare({name: model.train() for name, model in models.items()}, batch), batch)


def cache_epoch(args: argparse.Namespace) -> str:
    """Epochs from the feature cache, from images in memory, and of full fine-tuning."""
    images = [{"pixel_values": torch.randn(3, 224, 224), "labels": i % 10} for i in range(32)]
    full = vit(args.device).train()
    rows = [
        ["plan", "KiB per image", "built, s", "images, s", "cache, s", "cache to images", "to full", "FLOPs behind"]
    ]
    for plan in (
        "{3,7,11}, reduce {3,6,9}",
        "last 4, reduce after 7",
        "{9,10,11}, reduce {8}",
        "{9,10,11}, reduce {3,6,9}",
    ):
        model = bsr(args.device, **PLANS[plan])
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            cache = FeatureCache.build(model, images, folder, batch_size=args.batch_size, progress=False)
            built = time.perf_counter() - begin
            kib = (Path(folder) / "cached_tokens.bin").stat().st_size / len(images) / 1024
            taken: dict[str, list[float]] = {"full": [], "images": [], "cache": []}
            with cache.read_by(model):
                for _ in range(3):
                    taken["full"].append(epoch_seconds(full, images, args))
                    taken["images"].append(epoch_seconds(model, images, args))
                    taken["cache"].append(epoch_seconds(model, cache, args))
                batches = (next(iter(DataLoader(data, args.batch_size))) for data in (images, cache))
                whole, behind = (count_flops(TrainingStep(model, batch)) for batch in batches)
        full_s, whole_s, cache_s = (statistics.median(values) for values in taken.values())
        bar = 0.5 if plan == "last 4, reduce after 7" else None
        ratio = verdict(f"{cache_s / whole_s:.3f}", cache_s / whole_s, bar)
        seconds = [f"{built:.1f}", f"{whole_s:.1f}", f"{cache_s:.1f}"]
        rows.append([plan, f"{kib:.0f}", *seconds, ratio, f"{cache_s / full_s:.3f}", f"{behind / whole:.2f}"])
    return table(rows) + (
        f"\n\nEpochs of 32 images, ready in memory or read from the cache (bf16), BSR exact, batch {args.batch_size}, "
        "median of 3 in turn. To full: from the cache, to an epoch of full fine-tuning from images in the same turns. "
        "FLOPs: of a training step, the share that a cache cannot spare."
    )


def epoch_seconds(model: nn.Module, data: Any, args: argparse.Namespace) -> float:
    """Seconds of one training epoch on `data`."""
    begin = time.perf_counter()
    for batch in DataLoader(data, args.batch_size, shuffle=True):
        TrainingStep(model, {name: value.to(args.device) for name, value in batch.items()})()
    return time.perf_counter() - begin


METHODS: dict[str, Callable[[str], nn.Module]] = {
    "full fine-tuning": lambda device: vit(device),
    "full, checkpointing": lambda device: checkpointing(vit(device)),
    "LoRA r=8, q k v": lambda device: get_peft_model(
        vit(device), LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], modules_to_save=["classifier"])
    ),
    "BSR stock": lambda device: bsr(device, lean="off"),
    "BSR stock, checkpointing": lambda device: checkpointing(bsr(device, lean="off")),
    "BSR exact": lambda device: bsr(device, lean="exact"),
    "BSR max": lambda device: bsr(device, lean="max"),
    "BSR max, int8": lambda device: bsr(device, lean="max", saved_activations="int8"),
}


def memory(args: argparse.Namespace) -> str:
    """Two training runs of each method, each in a new process: with glibc's defaults, then without gaps."""
    found = {}
    for name in METHODS:
        worker = [__file__, "--worker", name, "--device", args.device, "--batch-size", args.batch_size, "--steps"]
        found[name] = in_own_process(*worker, args.steps, gapless=False)
        if args.device == "cpu":
            found[name]["live"] = in_own_process(*worker, 4)["peak"]
    peer, stock = found["BSR stock, checkpointing"], found["BSR stock"]
    rows = [["method", "weights, MiB", "saved, MiB", "peak, MiB", "peak without gaps, MiB", "step, s", "to BSR stock"]]
    for name, row in found.items():
        limits = {"BSR exact": stock, "BSR max": peer}.get(name, {})
        peaks = [verdict(f"{row[k]:.0f}", row[k], limits.get(k)) if k in row else "" for k in ("peak", "live")]
        seconds = verdict(f"{row['seconds']:.2f}", row["seconds"], limits.get("seconds"))
        ratio = f"{row['seconds'] / stock['seconds']:.2f}"
        rows.append([name, f"{row['weights']:.0f}", f"{row['saved']:.0f}", *peaks, seconds, ratio])
    weights = {name: found[name]["weights"] / found["full fine-tuning"]["weights"] for name in ("BSR exact", "BSR max")}
    resident = ", ".join(f"{name} {verdict(f'{value:.3f}', value, 1.02)}" for name, value in weights.items())
    where = "torch's peak on the device" if args.device == "cuda" else "the process's resident set (VmHWM)"
    return table(rows) + (
        f"\n\n{args.steps} AdamW steps, batch {args.batch_size}, each method in a fresh process. Weights: parameters "
        f"in memory, without those mapped from files; to the base model's: {resident}. Saved: activations kept for "
        f"backward, the whole batch. Peak: {where}, its high-water mark reset before the first step; Python, torch "
        "and weights are in it. Without gaps: the same in another process with MALLOC_MMAP_THRESHOLD_ and "
        "MALLOC_TRIM_THRESHOLD_ = 131072, where glibc gives freed tensors back at once instead of keeping gaps. "
        "Bars: exact against BSR stock, max against its checkpointing."
    )


def train_in_this_process(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak and step time of one method."""
    model = METHODS[name](args.device).train()
    batch = random_batch(args.batch_size, args.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    kept = saved_activations(model, lambda: model(**batch).loss)
    seconds = []
    with PeakMemory(args.device) as peak:
        for _ in range(args.steps):
            begin = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    mapped = parked_bytes(model)
    weights = (sum(p.nbytes for p in model.parameters()) - mapped) / 2**20
    return {
        "peak": peak.peak_bytes / 2**20,
        "seconds": statistics.median(seconds),
        "saved": kept / 2**20,
        "weights": weights,
    }


def parked_bytes(model: nn.Module) -> int:
    """Bytes of parameters in mapped files, or not on the accelerator."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        return sum(p.nbytes for p in model.parameters() if p.device != device)
    with open("/proc/self/maps") as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if "peft_bsr_" in line]
    return sum(p.nbytes for p in model.parameters() if any(a <= p.data_ptr() < b for a, b in ranges))


def convergence(args: argparse.Namespace) -> str:
    """Losses of 200 steps on real images by level, and of a stock run with slightly changed initial weights."""
    stock = loss_curve(args.data, 200, **LEVELS["stock"])
    curves = {"stock": stock, "stock, nudged": loss_curve(args.data, 200, nudge=1e-7, **LEVELS["stock"])}
    curves |= {level: loss_curve(args.data, 200, **settings) for level, settings in LEVELS.items() if level != "stock"}
    rows = [["level", "first 10", "last 50", "all", "all, to stock", "largest difference, first 20", "all"]]
    noise = [max(abs(a - b) for a, b in zip(curves["stock, nudged"][:n], stock[:n], strict=True)) for n in (20, 200)]
    for level, curve in curves.items():
        means = [statistics.mean(part) for part in (curve[:10], curve[-50:], curve)]
        off = means[-1] / statistics.mean(stock) - 1
        rows.append([level, *(f"{mean:.4f}" for mean in means)])
        rows[-1].append(verdict(f"{off:+.2%}", abs(off), 0.01 if "int8" in level else None))
        for number, limit in zip((20, 200), noise, strict=True):
            largest = max(abs(a - b) for a, b in zip(curve[:number], stock[:number], strict=True))
            rows[-1].append(verdict(f"{largest:.1e}", largest, 10 * limit if level in ("exact", "max") else None))
    return table(rows) + (
        "\n\nViT-Ti/16, CIFAR-10 at 224 px, 10 new classes, batch 16, AdamW 5e-4, the same batches. Nudged: trained "
        "weights multiplied by 1 + 1e-7 x noise, to see how far rounding alone carries; the bar of exact and max is "
        "ten times that, the bar of int8 is 1 % of the mean loss."
    )


def loss_curve(data: Path, steps: int, nudge: float = 0.0, **settings: Any) -> list[float]:
    """Training losses of BSR on ViT-Ti, from the same seed.

    Args:
        data: Folder with `vit-tiny-patch16-224` and `cifar10-train-5000.parquet`.
        steps: Number of steps.
        nudge: Relative noise on the initial trained weights.
        settings: Fields of BSRConfig.
    """
    from datasets import load_dataset
    from transformers import AutoImageProcessor

    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_pretrained(
        data / "vit-tiny-patch16-224", num_labels=10, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    processor = AutoImageProcessor.from_pretrained(data / "vit-tiny-patch16-224", backend="pil")
    images = load_dataset("parquet", data_files=str(data / "cifar10-train-5000.parquet"), split="train").shuffle(seed=0)
    model = get_peft_model(base, BSRConfig(**settings)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained if nudge else ():
        parameter.data.mul_(1 + nudge * torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(trained, lr=5e-4)
    losses = []
    for step in range(steps):
        rows = images[16 * step : 16 * (step + 1)]
        pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
        loss = model(pixel_values=pixels, labels=torch.tensor(rows["label"])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def vit(device: str) -> nn.Module:
    """ViT-B/16 with 10 classes."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_labels=10)).to(device)


def bsr(device: str, **settings: Any) -> nn.Module:
    """ViT-B/16 with BSR, in training mode."""
    return get_peft_model(vit(device), BSRConfig(**settings)).train()


def checkpointing(model: nn.Module) -> nn.Module:
    """Turn on gradient checkpointing of the blocks that gradients reach."""
    inner: Any = model.base_model.model if hasattr(model, "peft_config") else model
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def random_batch(size: int, device: str) -> dict[str, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(size, 3, 224, 224, generator=generator), torch.arange(size) % 10
    return {"pixel_values": images.to(device), "labels": labels.to(device)}


def all_gradients(make: Callable[[], nn.Module], device: str, dtype: torch.dtype, **settings: Any) -> Tensor:
    """Gradients of all trained weights in one vector, fp32."""
    torch.manual_seed(0)
    model = get_peft_model(make().to(device, dtype), BSRConfig(**settings)).train()
    inputs = probe_inputs(model.base_model.model, 4, model.base_model.spec.image_shape)
    torch.manual_seed(0)
    outputs = [output for output in tensors_of(model(**inputs)) if output.requires_grad]
    sum(output.float().square().mean() for output in outputs).backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance, by norm."""
    return float((found - expected).norm() / expected.norm())


def verdict(text: str, value: float, bar: float | None) -> str:
    """The figure, with its bar if it has one."""
    if bar is None:
        return text
    shown = f"{bar:.3g}" if bar < 100 else f"{bar:.0f}"
    return f"{text} (bar {shown}: {'met' if value <= bar else 'MISSED'})"


def table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    main()
