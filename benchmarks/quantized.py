"""Weights of frozen blocks in 8 bits and in bfloat16: memory and step time on ViT-B/16, accuracy on real images.

    python benchmarks/quantized.py [--batch-size 8] [--device cuda] [--autocast]
    python benchmarks/quantized.py --model MODEL --data TRAIN.parquet TEST.parquet [--images 1000] [--steps 60]

The first prints weights in memory, activations kept for backward and the time of a step, with random weights, in fp32
or under autocast to bfloat16. The second fine-tunes a real model with each method, twice: with frozen weights in full
precision and in 8 bits.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
from typing import get_args

import numpy as np
import torch
from datasets import load_dataset
from peft import get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig, SynQTConfig
from peft_bsr.cost import TrainingStep, model_memory, saved_activations
from peft_bsr.tuners.base.frozen_weights import FrozenWeights

METHODS = {
    "BSR": BSRConfig(),
    "BSR, last 3 blocks": BSRConfig(trainable_blocks="last:3"),
    "BSR, lora": BSRConfig(trainable="lora"),
    "SynQT": SynQTConfig(),
}


class AutocastStep(TrainingStep):
    """A step whose forward runs under autocast to bfloat16."""

    def forward(self) -> torch.Tensor:
        """The loss alone."""
        with torch.autocast(self.batch["labels"].device.type, dtype=torch.bfloat16):
            return super().forward()


def config_of(name: str, frozen_weights: str) -> BSRConfig | SynQTConfig:
    """The method's configuration with `frozen_weights` "full", "bfloat16" or "int8"."""
    config = copy.copy(METHODS[name])
    config.frozen_weights = frozen_weights
    return config


def print_costs(batch_size: int, device: str, repeats: int, autocast: bool) -> None:
    """Print the table of memory and time."""
    batch = {
        "pixel_values": torch.randn(batch_size, 3, 224, 224, device=device),
        "labels": torch.randint(10, (batch_size,), device=device),
    }
    print("| method | frozen weights | weights, MiB | saved, MiB per image | step |\n|---|---|---|---|---|")
    for name in METHODS:
        steps = {}
        for weights in get_args(FrozenWeights):
            torch.manual_seed(0)
            model = get_peft_model(ViTForImageClassification(ViTConfig(num_labels=10)), config_of(name, weights))
            make = AutocastStep if autocast else TrainingStep
            steps[weights] = make(model.to(device).train(), batch)
        times: dict[str, list[float]] = {weights: [] for weights in steps}
        for _ in range(repeats + 1):
            for weights, step in steps.items():
                times[weights].append(step.seconds())
        for weights, step in steps.items():
            memory = model_memory(step.model)
            held = (memory.trainable_bytes + memory.frozen_bytes) / 2**20
            saved = saved_activations(step.model, step.forward) / batch_size / 2**20
            ratio = statistics.median(b / a for a, b in zip(times["full"][1:], times[weights][1:], strict=True))
            print(f"| {name} | {weights} | {held:.0f} | {saved:.1f} | {ratio:.2f} |", flush=True)
    dtype = "bf16 autocast" if autocast else "fp32"
    print(
        f"\nViT-B/16, 224 px, {dtype}, batch {batch_size}, {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; alternating steps, median ratio of {repeats}."
    )


def print_accuracy(model_name: str, files: list[str], num_images: int, num_steps: int) -> None:
    """Print the table of accuracies."""
    data = load_dataset("parquet", data_files={"train": files[0], "test": files[1]})
    processor = AutoImageProcessor.from_pretrained(model_name)
    train, test = (_prepare(data[split], processor, num_images) for split in ("train", "test"))
    classes = int(max(train[1].max(), test[1].max())) + 1
    print("| method | frozen weights | test accuracy | mean loss of the last 10 steps |\n|---|---|---|---|")
    for name in METHODS:
        for weights in ("full", "int8"):
            torch.manual_seed(0)
            base = AutoModelForImageClassification.from_pretrained(
                model_name, num_labels=classes, ignore_mismatched_sizes=True
            )
            model = get_peft_model(base, config_of(name, weights))
            accuracy, loss = _train(model, train, test, num_steps)
            print(f"| {name} | {weights} | {accuracy:.3f} | {loss:.3f} |", flush=True)
    print(
        f"\n{model_name}, {len(train[1])} training and {len(test[1])} test images, {num_steps} steps of 32, AdamW 6e-4 "
        f"falling to 0, seed 0, CPU, {torch.get_num_threads()} threads, torch {torch.__version__}."
    )


def _prepare(split: object, processor: object, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    columns = split.column_names
    image, label = (next(c for c in columns if word in c) for word in ("im", "label"))
    chosen = split.shuffle(seed=0).select(range(min(num_images, len(split))))
    pictures = [_open(picture) for picture in chosen[image]]
    pixels = [processor(pictures[i : i + 64], return_tensors="pt")["pixel_values"] for i in range(0, len(pictures), 64)]
    return torch.cat(pixels), torch.from_numpy(np.array(chosen[label]))


def _open(picture: object) -> Image.Image:
    picture = Image.open(io.BytesIO(picture["bytes"])) if isinstance(picture, dict) else picture
    return picture.convert("RGB")


def _train(model: nn.Module, train: tuple, test: tuple, num_steps: int) -> tuple[float, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(num_steps):
        chosen = torch.randint(len(train[1]), (32,), generator=generator)
        loss = model(pixel_values=train[0][chosen], labels=train[1][chosen]).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        guesses = [model(pixel_values=part).logits.argmax(-1) for part in test[0].split(64)]
    return float((torch.cat(guesses) == test[1]).float().mean()), statistics.mean(losses[-10:])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16 (default fp32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--model", help="a pretrained vision transformer; measures accuracy instead")
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"), help="parquet files with images and labels")
    parser.add_argument("--images", type=int, default=1000, help="at most so many of each file (default 1000)")
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    args = parser.parse_args()
    if args.model:
        print_accuracy(args.model, args.data, args.images, args.steps)
    else:
        print_costs(args.batch_size, args.device, args.repeats, args.autocast)


if __name__ == "__main__":
    main()
