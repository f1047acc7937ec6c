"""ALaST: in each step, budgets decide which blocks train and how many tokens they see; the result is an ordinary ViT.

    python examples/alast.py
    python examples/alast.py --model google/vit-base-patch16-224-in21k --dataset beans --epochs 3

It uses the images and weights of `quickstart.py`, and draws the history of the budgets to `budgets.png`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers
from peft import get_peft_model
from transformers import Trainer

from peft_bsr import ALaSTConfig, TrainabilityCallback
from peft_bsr.data import collate, load_images, load_processor, put_aside, with_pixels
from peft_bsr.training import ALaSTCallback
from peft_bsr.training.scores import compute_accuracy
from peft_bsr.viz import draw_budgets

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, load_base, make_parser, size_of, training_arguments


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, "alast")
    parser.add_argument("--epochs", type=float, default=4, help="default 4")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (default: by epochs)")
    parser.add_argument("--output", type=Path, default=Path("outputs/alast"), help="default outputs/alast")
    return parser.parse_args()


def main() -> None:
    """Train, draw the budgets, merge, save."""
    args = parse_arguments()
    transformers.set_seed(0)
    data = put_aside(load_images(args.dataset), validation_size=0)
    source, _ = find_model(args.model)
    processor = load_processor(source, size_of(args))
    model = load_base(source, data.labels)
    model = get_peft_model(model, ALaSTConfig())

    callback = ALaSTCallback()
    trainer = Trainer(
        model=model,
        args=training_arguments(args, save_strategy="no"),
        train_dataset=with_pixels(data.train, processor),
        eval_dataset=with_pixels(data.test, processor),
        data_collator=collate,
        compute_metrics=compute_accuracy,
        callbacks=[TrainabilityCallback(), callback],  # stops before the first step if something would not train
    )
    trainer.train()
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    print(f"Budgets drawn to {draw_budgets(callback.history, args.output / 'budgets.png')}")

    plain = model.merge_and_unload()  # exact: evaluation never drops tokens
    plain.save_pretrained(args.output / "model")
    processor.save_pretrained(args.output / "model")
    print(f"{type(plain).__name__} without adapter saved to {args.output / 'model'}")


if __name__ == "__main__":
    main()
