"""Will it fit? Find plans that train a model within a memory budget, from its config alone, without its weights.

    python examples/plan_for_budget.py --memory 2GB --batch-size 32
    python examples/plan_for_budget.py --model google/vit-large-patch16-224-in21k --memory 8GB --dtype bfloat16

Without `--model` it plans for ViT-B/16.
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig

from peft_bsr.cost import estimate, plan_for_budget
from peft_bsr.errors import ConfigError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder; only its config is read (default: ViT-B/16)")
    parser.add_argument("--memory", default="2GB", help='"2GB", "1.5GiB", ... (default 2GB)')
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default 32)")
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--dtype", default="float32", help="dtype of weights and activations (default float32)")
    return parser.parse_args()


def main() -> None:
    """Print the memory of full fine-tuning, and the plans that fit."""
    args = parse_arguments()
    config = AutoConfig.from_pretrained(args.model) if args.model else ViTConfig()
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForImageClassification.from_config(config)
    settings = {"batch_size": args.batch_size, "image_size": args.image_size, "dtype": getattr(torch, args.dtype)}

    full = estimate(model, **settings)
    print(f"Full fine-tuning, batch {args.batch_size}:\n{full.describe()}\n")
    try:
        plans = plan_for_budget(model, args.memory, **settings)
    except ConfigError as error:
        raise SystemExit(str(error)) from error
    print(f"{len(plans)} plans fit into {args.memory}; the first gives up least:\n")
    for plan in plans:
        print(plan.describe(), "\n")

    best = plans[0]
    if best.config is not None:  # also works on the meta device: what trains is known before the download
        adapted = get_peft_model(model, best.config)
        print("The first of them: ", end="")
        adapted.print_trainable_parameters()


if __name__ == "__main__":
    main()
