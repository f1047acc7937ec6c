"""Activations that SAM's image encoder keeps for backward: full fine-tuning, PEFT's LoRA, and its last three blocks.

    python benchmarks/sam.py                    # SAM ViT-B, 1024 px, batch 1, fp32
    python benchmarks/sam.py --pixels 256 --real

Every storage that is alive after the forward counts once; parameters, image and loss are left out. The forward runs on
tensors without memory, which take the same operations; with `--real` also on the model itself. Adapters are checked on
a narrow encoder of 128 px with random weights.
"""

from __future__ import annotations

import argparse
import copy
import platform
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import SamVisionConfig, SamVisionModel

from peft_bsr import BSRConfig
from peft_bsr.compat.torch_api import no_memory
from peft_bsr.cost.dry_run import without_memory
from peft_bsr.cost.proxy import attach_resolved
from peft_bsr.engine import LivingBytes
from peft_bsr.tuners import resolve

LAST = {"keep_rate": 1.0, "trainable_blocks": "last:3"}
LORA = "LoRA (PEFT), all Linears"
ROWS = {
    "full fine-tuning": None,
    LORA: LoraConfig(r=8, target_modules="all-linear"),
    "last 3 blocks, whole, stock": BSRConfig(**LAST, lean="off"),
    "last 3 blocks, whole, `exact`": BSRConfig(**LAST, lean="exact"),
    "last 3 blocks, whole, `max`": BSRConfig(**LAST, lean="max"),
    "last 3 blocks, low-rank, `exact`": BSRConfig(**LAST, trainable="lora", lean="exact"),
    "last 3 blocks, low-rank, `max`": BSRConfig(**LAST, trainable="lora", lean="max"),
}


def encoder(pixels: int, **settings: int) -> nn.Module:
    """SAM ViT-B's image encoder for images of `pixels`."""
    torch.manual_seed(0)
    return SamVisionModel(SamVisionConfig(image_size=pixels, **settings))


def adapted(model: nn.Module, config: BSRConfig | LoraConfig | None) -> nn.Module:
    """The encoder with the row's adapter, in training mode."""
    if isinstance(config, BSRConfig):
        narrow = encoder(128, hidden_size=96, mlp_dim=192, output_channels=32)
        return attach_resolved(model, config, resolve(narrow.eval(), copy.deepcopy(config)))[0].train()
    return (model if config is None else get_peft_model(model, copy.deepcopy(config))).train()


def kept(model: nn.Module, image: Tensor) -> int:
    """Bytes alive after a forward, without the loss."""
    with LivingBytes() as living:
        loss = model(pixel_values=image).last_hidden_state.float().mean()
    return living.bytes(exclude=[loss, image])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024, help="side of the image (default 1024)")
    parser.add_argument("--real", action="store_true", help="also measure on tensors with memory (1024 px: 20 GB)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    print(f"CPU, fp32, {args.pixels} px, batch 1, {versions}, Python {platform.python_version()}\n")
    columns = ["", "trained parameters", "kept for backward, MiB", "of LoRA's", *(["with memory"] if args.real else [])]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    reference = 0
    for name, config in ROWS.items():
        with torch.device("meta"):
            model = encoder(args.pixels)
        model = adapted(model, config)
        with no_memory():
            found = kept(without_memory(model, "cpu"), torch.zeros(1, 3, args.pixels, args.pixels))
        reference = found if name == LORA else reference
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = f"{found / reference:.1%}" if reference else ""
        cells = [name, f"{trained / 1e6:.2f} M", f"{found / 2**20:,.1f}", share]
        if args.real:
            real = adapted(encoder(args.pixels), config)
            cells.append(f"{kept(real, torch.randn(1, 3, args.pixels, args.pixels)) / 2**20:,.1f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
