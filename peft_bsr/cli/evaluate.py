"""Accuracy of an adapter on the test images of a data set."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import find_adapter
from peft_bsr.errors import DatasetError, UsageError
from peft_bsr.hub import load, load_image_processor
from peft_bsr.training.images import DIGITS, collate, compute_accuracy, load_images, with_pixels

EXAMPLES = """\
examples:
  peft-bsr evaluate outputs/train/adapter --dataset beans
  peft-bsr evaluate me/pets-bsr --dataset pets.parquet --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", metavar="ADAPTER", help="Hub id or folder of an adapter")
    parser.add_argument("--dataset", default=DIGITS, help="Hub id, .parquet, folder by class (default digits)")
    parser.add_argument("--base", help="base model, where the adapter does not name one that can be read")
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")


def run(args: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Run the command."""
    if find_adapter(args.model) is None:
        raise UsageError(f"`{args.model}` is a model, no adapter: there is nothing of ours to evaluate.")
    data = load_images(args.dataset)
    model: Any = load(args.model, base=args.base)
    processor = load_image_processor(args.model, base=args.base)
    own = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if own != data.labels:
        raise DatasetError(f"`{args.dataset}` has the classes {data.labels[:20]}, the adapter tells apart {own[:20]}.")
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
            eval_dataset=with_pixels(data.test, processor),
            compute_metrics=compute_accuracy,
        )
        trainer.remove_callback(PrinterCallback)
        scores = trainer.evaluate()
    result = {
        "model": args.model,
        "dataset": args.dataset,
        "images": len(data.test),
        "accuracy": scores["eval_accuracy"],
        "loss": scores["eval_loss"],
        "images_per_second": scores["eval_samples_per_second"],
    }
    out.facts(f"{args.model} on {args.dataset}", result)
    return result
