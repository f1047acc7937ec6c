"""BSR, full fine-tuning and LoRA on ViT-B/16: saved activations, MACs, FLOPs and step time, in one run.

    python benchmarks/bsr_vit_base.py [--batch-size 8] [--device cuda]

The weights are random; they do not affect these figures. BSR runs stock blocks (`lean="off"`) unless noted.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_bsr import BSRConfig
from peft_bsr.cost import compare, cost_table

METHODS = {
    "LoRA r=8, q and v of all blocks": LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]),
    "LoRA r=8, every Linear": LoraConfig(target_modules="all-linear", modules_to_save=["classifier"]),
    "BSR, keep .5, fused": BSRConfig(keep_rate=0.5, lean="off"),
    "BSR, keep .5, dropped only": BSRConfig(keep_rate=0.5, fuse_dropped=False, lean="off"),
    "BSR, keep .5, full view": BSRConfig(keep_rate=0.5, mode="full_view", lean="off"),
    "BSR, keep .7, fused": BSRConfig(keep_rate=0.7, lean="off"),
    "BSR, all tokens": BSRConfig(keep_rate=1.0, lean="off"),
    "BSR {9,10,11}, keep .5, fused": BSRConfig(trainable_blocks="last:3", keep_rate=0.5, lean="off"),
    "BSR with LoRA in the blocks, keep .5, fused": BSRConfig(trainable="lora", keep_rate=0.5, lean="off"),
    "BSR, keep .5, fused, lean exact": BSRConfig(keep_rate=0.5),
    "BSR, keep .5, fused, lean max": BSRConfig(keep_rate=0.5, lean="max"),
    "BSR, keep .5, fused, lean max, 8 bits": BSRConfig(keep_rate=0.5, lean="max", saved_activations="int8"),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each method (default 5)")
    args = parser.parse_args()

    def vit() -> ViTForImageClassification:
        return ViTForImageClassification(ViTConfig(num_labels=10)).to(args.device)

    models = {"full fine-tuning": vit()}
    models |= {name: get_peft_model(vit(), config) for name, config in METHODS.items()}
    batch = {
        "pixel_values": torch.randn(args.batch_size, 3, 224, 224, device=args.device),
        "labels": torch.randint(10, (args.batch_size,), device=args.device),
    }
    print("ViT-B/16, 10 classes, scaled-dot-product attention\n")
    print(cost_table(compare(models, batch, args.repeats), batch))


if __name__ == "__main__":
    main()
