"""SynQT: learned queries read a frozen backbone; train from images, or from a cache without running the backbone.

    python examples/synqt.py
    python examples/synqt.py --model google/vit-base-patch16-224-in21k --dataset beans --epochs 10 --keep-rate 0.5

It uses the images and weights of `quickstart.py`. The size of the cache on disk is printed before it is built.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from rich.console import Console
from transformers import Trainer

from peft_bsr import FeatureCache, SynQTConfig, TrainabilityCallback
from peft_bsr.cost import saved_activations
from peft_bsr.data import load_images, load_processor, put_aside, with_pixels
from peft_bsr.training.scores import compute_accuracy

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, load_base, make_parser, size_of, training_arguments

console = Console()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, "synqt")
    parser.add_argument("--num-queries", type=int, default=4, help="learned prompts per layer (default 4)")
    parser.add_argument(
        "--keep-rate", type=float, default=1.0, help="share of tokens kept at a reduction (default 1.0)"
    )
    parser.add_argument("--epochs", type=float, default=2, help="default 2")
    parser.add_argument("--output", type=Path, default=Path("outputs/synqt"), help="output folder")
    return parser.parse_args()


def main() -> None:
    """Print the memory kept for backward, build the cache, train from it, save the adapter."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = put_aside(load_images(args.dataset), validation_size=0)
    source, model_name = find_model(args.model)
    processor = load_processor(source, size_of(args))
    size = processor.size["height"]
    train, test = with_pixels(data.train, processor), with_pixels(data.test, processor)
    console.print(f"\n[bold]{model_name}[/bold], {len(train)} training and {len(test)} test images at {size} px")
    transformers.set_seed(0)
    base = load_base(source, data.labels)
    model = get_peft_model(base, SynQTConfig(num_queries=args.num_queries, keep_rate=args.keep_rate)).train()
    sample = {"pixel_values": train[0]["pixel_values"][None], "labels": torch.tensor([train[0]["labels"]])}
    kept = saved_activations(model, lambda: model(**sample).loss)
    console.print(f"{model.get_nb_trainable_parameters()[0]:,} trained, {kept / 2**20:.1f} MiB per image for backward")

    cache = FeatureCache.build(model, train, args.output / "cache")
    with cache.read_by(model):
        trainer = Trainer(
            model=model,
            args=training_arguments(args, weight_decay=1e-2, save_strategy="no"),
            train_dataset=cache,
            eval_dataset=test,
            compute_metrics=compute_accuracy,
            callbacks=[TrainabilityCallback()],  # stops before the first step if something would not train
        )
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        accuracy = trainer.evaluate()["eval_accuracy"]
    model.save_pretrained(args.output / "adapter")
    processor.save_pretrained(args.output / "adapter")
    console.print(f"{args.epochs:g} epochs from the cache: {seconds:.0f} s, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
