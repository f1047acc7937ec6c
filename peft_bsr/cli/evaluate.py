"""Figures of an adapter, a plain model or an ONNX file: on the test images, or on all if there is no test split."""

from __future__ import annotations

import argparse

from peft_bsr.cli.images import DATA_HELP, add_scoring, check_at_least, read_scored_data
from peft_bsr.cli.output import Output
from peft_bsr.data import DIGITS
from peft_bsr.prediction import open_predictor
from peft_bsr.prediction.scoring import score

EXAMPLES = """\
examples:
  peft-bsr evaluate outputs/train/adapter --dataset beans
  peft-bsr evaluate outputs/train/adapter --dataset photos --split test
  peft-bsr evaluate me/pets-bsr --dataset labels.csv --label-column species --json
  peft-bsr evaluate model.onnx --dataset photos
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="adapter, model, or .onnx file of `peft-bsr export`")
    parser.add_argument("--dataset", default=DIGITS, help=DATA_HELP)
    add_scoring(parser)


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    check_at_least(args, batch_size=1, image_size=1, workers=0)
    predictor = open_predictor(args.model, base=args.base, device=args.device, image_size=args.image_size)
    split, images = read_scored_data(args, predictor, out)
    found = score(predictor, images, batch_size=args.batch_size, workers=args.workers, progress=not out.is_json)
    result = {
        "model": args.model,
        "dataset": args.dataset,
        "split": split,
        "images": len(images),
        **found.figures(),
        "images_per_second": found.images_per_second,
    }
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in result.items()}
    out.facts(f"{args.model} on {args.dataset}", shown)
    for table in found.tables():
        out.table(*table)
    return result | found.details()
