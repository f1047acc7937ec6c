"""Accuracy of an adapter on the test images of a data set, or on all of them if it has no test split."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from peft_bsr.cli.images import DATA_HELP, add_columns, add_sizes, read_scored_data
from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import find_adapter
from peft_bsr.data import DIGITS, collate, with_pixels
from peft_bsr.errors import UsageError
from peft_bsr.hub import load, load_image_processor
from peft_bsr.training.scores import compute_accuracy

EXAMPLES = """\
examples:
  peft-bsr evaluate outputs/train/adapter --dataset beans
  peft-bsr evaluate outputs/train/adapter --dataset photos --split test
  peft-bsr evaluate me/pets-bsr --dataset labels.csv --label-column species --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", metavar="ADAPTER", help="Hub id or folder of an adapter")
    parser.add_argument("--dataset", default=DIGITS, help=DATA_HELP)
    parser.add_argument("--split", help="train, validation or test (default: test, or without one all images)")
    add_columns(parser)
    add_sizes(parser)
    parser.add_argument("--base", help="base model, where the adapter does not name one that can be read")
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")


def run(args: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Run the command."""
    if find_adapter(args.model) is None:
        raise UsageError(f"`{args.model}` is a model, no adapter: there is nothing of ours to evaluate.")
    model: Any = load(args.model, base=args.base)
    processor = load_image_processor(args.model, base=args.base)
    own = [model.config.id2label[index] for index in range(model.config.num_labels)]
    split, images = read_scored_data(args, own, out)
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=args.batch_size,
                report_to="none",
                remove_unused_columns=False,
                label_names=["labels"],
                dataloader_pin_memory=torch.cuda.is_available(),
                disable_tqdm=out.is_json,
            ),
            data_collator=collate,
            eval_dataset=with_pixels(images, processor),
            compute_metrics=compute_accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        scores = trainer.evaluate()
    result = {
        "model": args.model,
        "dataset": args.dataset,
        "split": split,
        "images": len(images),
        "accuracy": scores["eval_accuracy"],
        "loss": scores["eval_loss"],
        "images_per_second": scores["eval_samples_per_second"],
    }
    out.facts(f"{args.model} on {args.dataset}", result)
    return result
