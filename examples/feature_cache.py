"""Fine-tune from cached features: the frozen leading blocks run once, not in every epoch.

    python examples/feature_cache.py
    python examples/feature_cache.py --model google/vit-base-patch16-224-in21k --dataset beans --epochs 10

It uses the images and weights of `quickstart.py`. First the same epochs are timed from images, on another adapter.
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

from peft_bsr import BSRConfig, FeatureCache, TrainabilityCallback
from peft_bsr.data import load_images, load_processor, put_aside, with_pixels
from peft_bsr.training.scores import compute_accuracy

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, load_base, make_parser, size_of, training_arguments

console = Console()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--trainable-blocks", default="last:4", help='"every:n" or "last:n" (default last:4)')
    parser.add_argument("--epochs", type=float, default=2, help="default 2")
    parser.add_argument("--output", type=Path, default=Path("outputs/feature_cache"), help="output folder")
    return parser.parse_args()


def main() -> None:
    """Build the cache, train from it and from images, compare."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data = put_aside(load_images(args.dataset), validation_size=0)
    source, model_name = find_model(args.model)
    processor = load_processor(source, size_of(args))
    size = processor.size["height"]
    train, test = with_pixels(data.train, processor), with_pixels(data.test, processor)
    console.print(f"\n[bold]{model_name}[/bold], {len(train)} training and {len(test)} test images at {size} px")

    def fresh_model() -> torch.nn.Module:
        transformers.set_seed(0)
        base = load_base(source, data.labels)
        return get_peft_model(base, BSRConfig(trainable_blocks=args.trainable_blocks))

    def train_on(model: torch.nn.Module, dataset: object) -> tuple[float, float]:
        trainer = Trainer(
            model=model,
            args=training_arguments(args, save_strategy="no"),
            train_dataset=dataset,
            eval_dataset=test,
            compute_metrics=compute_accuracy,
            callbacks=[TrainabilityCallback()],  # stops before the first step if something would not train
        )
        seconds = trainer.train().metrics["train_runtime"]
        return seconds, trainer.evaluate()["eval_accuracy"]

    from_images, accuracy = train_on(fresh_model(), train)
    model = fresh_model()
    begin = time.perf_counter()
    cache = FeatureCache.build(model, train, args.output / "cache")
    built = time.perf_counter() - begin
    with cache.read_by(model):
        from_cache, cached_accuracy = train_on(model, cache)
    model.save_pretrained(args.output / "adapter")
    processor.save_pretrained(args.output / "adapter")
    console.print(
        f"{args.epochs:g} epochs from images: {from_images:.0f} s, test accuracy {accuracy:.3f}\n"
        f"{args.epochs:g} epochs from the cache: {from_cache:.0f} s ({from_cache / from_images:.2f} of it), test "
        f"accuracy {cached_accuracy:.3f}; building the cache took {built:.0f} s, once."
    )


if __name__ == "__main__":
    main()
