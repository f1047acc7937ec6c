"""The table of docs/gpu.md: the largest batch that fits a card, predicted by the planner. Nothing is measured.

    python benchmarks/planner_cards.py

GPUs: bf16 autocast over fp32 weights, fused AdamW, frozen weights in bf16, not compiled. The laptop: fp32 on the CPU.
Each plan is predicted at two batch sizes; the peak is assumed to be linear in the batch size. Nine tenths of a card's
memory are used (the rest is for CUDA and gaps between tensors), 10 of a laptop's 16 GB; predictions get 5 % more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.cost import Setup, estimate

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
GB = 10**9
CARDS = {  # name -> bytes to use, whether it is a GPU, bytes of cuBLAS beyond the prediction
    "RTX 4060, 8 GB": (0.9 * 8 * GB, True, 0),
    "T4, 16 GB": (0.9 * 16 * GB, True, 0),
    "RTX 4090, 24 GB": (0.9 * 24 * GB, True, 0),
    "A100, 40 GB": (0.9 * 40 * GB, True, 0),
    "A100, 80 GB": (0.9 * 80 * GB, True, 0),
    "H100, 80 GB": (0.9 * 80 * GB, True, 2 * 24 * 2**20),
    "laptop, 16 GB, CPU": (10 * GB, False, 0),
}
PLANS: dict[str, BSRConfig | None] = {
    "full": None,
    "BSR": BSRConfig(),
    "last 3": BSRConfig(trainable_blocks="last:3", keep_rate=0.5),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT-B/16": lambda: ViTForImageClassification(ViTConfig(num_labels=100)),
    "ViT-B/16, 512 px": lambda: ViTForImageClassification(ViTConfig(num_labels=100, image_size=512)),
    "ViT-L/16": lambda: ViTForImageClassification(ViTConfig(num_labels=100, intermediate_size=4096, **LARGE)),
    "DINOv2-L/14": lambda: Dinov2ForImageClassification(Dinov2Config(num_labels=100, image_size=224, **LARGE)),
}
BATCHES = (16, 256)
MARGIN = 1.05


def main() -> None:
    """Predict and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    setups = {
        True: Setup(device="cuda", autocast=torch.bfloat16, optimizer="adamw_fused"),
        False: Setup(optimizer="adamw_fused"),
    }
    names = [(model, plan, is_gpu) for model in MODELS for plan in PLANS for is_gpu in setups]
    peaks = {name: _peaks(*name[:2], setups[name[2]]) for name in tqdm(names, unit="plan")}
    print(f"| largest batch: {', '.join(PLANS)} | {' | '.join(MODELS)} |")
    print("|---|" + "---|" * len(MODELS))
    for card, (memory, is_gpu, more) in CARDS.items():
        cells = [
            ", ".join(_largest(memory / MARGIN - more, peaks[model, plan, is_gpu]) for plan in PLANS)
            for model in MODELS
        ]
        print(f"| {card} | {' | '.join(cells)} |", flush=True)
    print(f"\nPredicted, not measured; torch {torch.__version__}, transformers {transformers.__version__}.")


def _peaks(model: str, plan: str, setup: Setup) -> list[int]:
    with torch.device("meta"):
        bare = MODELS[model]()
    config = PLANS[plan]
    if config is not None and setup.autocast is torch.bfloat16:
        config = replace(config, frozen_weights="bfloat16")
    return [estimate(bare, config, setup, batch_size=batch).total_bytes for batch in BATCHES]


def _largest(memory: float, peaks: list[int]) -> str:
    """Largest batch on the line through both peaks, to two digits."""
    an_image = (peaks[1] - peaks[0]) / (BATCHES[1] - BATCHES[0])
    batch = int(BATCHES[0] + (memory - peaks[0]) / an_image)
    if batch < 1:
        return "none"
    unit = 10 ** max(0, len(str(batch)) - 2)
    return str(batch // unit * unit)


if __name__ == "__main__":
    main()
