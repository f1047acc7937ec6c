"""ALaST: budgets decide at each step which blocks train and how many tokens they see; the result is an ordinary ViT.

    python examples/alast.py
    python examples/alast.py --model google/vit-base-patch16-224-in21k --dataset beans --epochs 3

Images and weights are those of `quickstart.py`. The budgets' history is drawn to `budgets.png`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from peft_bsr import ALaSTConfig
from peft_bsr.training import ALaSTCallback
from peft_bsr.training.images import collate, compute_accuracy, load_images, load_processor, with_pixels
from peft_bsr.viz import draw_budgets

sys.path.insert(0, str(Path(__file__).parent))
from quickstart import find_model, make_parser, size_of


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--epochs", type=float, default=4, help="default 4")
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (default: by epochs)")
    parser.add_argument("--output", type=Path, default=Path("outputs/alast"), help="default outputs/alast")
    return parser.parse_args()


def main() -> None:
    """Train, draw the budgets, merge, save."""
    args = parse_arguments()
    transformers.set_seed(0)
    data = load_images(args.dataset)
    source, _ = find_model(args.model)
    processor = load_processor(source, size_of(args))
    model = AutoModelForImageClassification.from_pretrained(
        source, id2label=dict(enumerate(data.labels)), ignore_mismatched_sizes=True
    )
    model = get_peft_model(model, ALaSTConfig())

    callback = ALaSTCallback()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output / "checkpoints"),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # pixels are made when they are asked for
            label_names=["labels"],  # a PeftModel does not tell them
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=with_pixels(data.train, processor),
        eval_dataset=with_pixels(data.test, processor),
        data_collator=collate,
        compute_metrics=compute_accuracy,
        callbacks=[callback],
    )
    trainer.train()
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.3f}")
    print(f"Budgets drawn to {draw_budgets(callback.history, args.output / 'budgets.png')}")

    plain = model.merge_and_unload()  # evaluation never dropped tokens: nothing is lost
    plain.save_pretrained(args.output / "model")
    processor.save_pretrained(args.output / "model")
    print(f"{type(plain).__name__} without adapter saved to {args.output / 'model'}")


if __name__ == "__main__":
    main()
