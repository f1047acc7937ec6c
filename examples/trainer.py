"""BSR with transformers' Trainer: any labelled images, checkpoints, resuming, an adapter at the end.

    python examples/trainer.py --model google/vit-base-patch16-224-in21k --dataset beans
    python examples/trainer.py --epochs 8 --resume      # continues the last run

Without arguments it trains the weights of `quickstart.py` on digits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import transformers
from peft import get_peft_model
from transformers import Trainer

from peft_bsr import BSRConfig, TrainabilityCallback
from peft_bsr.data import collate, load_images, load_processor, put_aside, with_pixels
from peft_bsr.training.scores import compute_accuracy

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, load_base, make_parser, size_of, training_arguments


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=float, default=4, help="default 4")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (default: by epochs)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output folder")
    parser.add_argument("--output", type=Path, default=Path("outputs/trainer"), help="default outputs/trainer")
    return parser.parse_args()


def main() -> None:
    """Train, evaluate, save."""
    args = parse_arguments()
    transformers.set_seed(0)
    data = put_aside(load_images(args.dataset))
    source, _ = find_model(args.model)
    processor = load_processor(source, size_of(args))
    model = load_base(source, data.labels)
    model = get_peft_model(model, BSRConfig())
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=training_arguments(args, eval_strategy="epoch", save_strategy="epoch", save_total_limit=2),
        train_dataset=with_pixels(data.train, processor),
        eval_dataset=with_pixels(data.validation, processor),
        data_collator=collate,
        compute_metrics=compute_accuracy,
        callbacks=[TrainabilityCallback()],  # stops before the first step if something would not train
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    print(f"test accuracy {trainer.evaluate(with_pixels(data.test, processor))['eval_accuracy']:.3f}")
    model.save_pretrained(args.output / "adapter")
    processor.save_pretrained(args.output / "adapter")


if __name__ == "__main__":
    main()
