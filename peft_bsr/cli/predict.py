"""Classes of images, written as CSV: by an adapter, a plain model, or an ONNX file of `peft-bsr export`."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from peft_bsr.cli.images import add_predicting, check_at_least
from peft_bsr.cli.output import Output
from peft_bsr.cli.prediction_table import PredictionTable, write_csv
from peft_bsr.errors import DatasetError, UsageError
from peft_bsr.prediction import Prediction, Predictor, open_predictor, to_prediction
from peft_bsr.prediction.answers import THRESHOLD
from peft_bsr.prediction.images import outputs_of, read_rows, row_name
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION

EXAMPLES = """\
examples:
  peft-bsr predict photos --model outputs/train/adapter --output predictions.csv
  peft-bsr predict leaf.jpg --model me/beans-bsr --top-k 3
  peft-bsr predict DATA --model outputs/train/adapter --all --output predictions.csv --overwrite
"""
_SHOWN = 20  # rows on the screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("input", nargs="+", metavar="INPUT", help="folders, image files, or one table or dataset")
    parser.add_argument("--model", required=True, metavar="MODEL", help="adapter, model, or .onnx file")
    parser.add_argument("--output", type=Path, metavar="CSV", help="CSV file to write (default: print a table)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--top-k", type=int, metavar="K", help="number of most probable classes (default 1)")
    shown.add_argument("--all", action="store_true", help="probabilities of all classes")
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"for multi-label models, probability from which a label is predicted (default {THRESHOLD})",
    )
    parser.add_argument("--image-column", metavar="NAME", help="column of images or paths (default: the only one)")
    parser.add_argument("--split", help="split of a dataset (default: all)")
    add_predicting(parser)


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    _check(args)
    rows = read_rows(args.input, image_column=args.image_column, split=args.split)
    predictor = open_predictor(args.model, base=args.base, device=args.device, image_size=args.image_size)
    _check_kind(args, predictor)
    top_k = None if args.all else args.top_k or 1
    threshold = THRESHOLD if args.threshold is None else args.threshold
    table = PredictionTable(predictor, top_k, threshold)
    found: list[Prediction] = []
    with write_csv(args.output, table.header) as write:
        outputs = outputs_of(
            predictor, rows, batch_size=args.batch_size, workers=args.workers, progress=not out.is_json
        )
        for index, one in enumerate(outputs):
            found.append(to_prediction(predictor, row_name(rows, index), one, top_k=top_k, threshold=threshold))
            if found[-1].error is None:
                write(table.row(found[-1]))
        bad = [one for one in found if one.error is not None]
        said = f"{len(bad)} of {len(found)} images cannot be read"
        if len(bad) == len(found):
            raise DatasetError(f"{said}: " + "; ".join(f"{one.file} ({one.error})" for one in bad))
    good = [one for one in found if one.error is None]
    if bad:
        out.note(f"{said} and are left out:\n" + "\n".join(f"  {one.file}: {one.error}" for one in bad))
    _show(out, args.output, table, good)
    return {
        "model": args.model,
        "images": len(good),
        "skipped": [{"file": one.file, "reason": one.error} for one in bad],
        "output": args.output,
        "predictions": [_plain(one) for one in good],
    }


def _check(args: argparse.Namespace) -> None:
    """Check the arguments before anything is read."""
    check_at_least(args, top_k=1, batch_size=1, image_size=1, workers=0)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UsageError(f"`--threshold {args.threshold}` must be a probability, from 0 to 1.")
    if args.output is None:
        return
    if args.output.exists() and not (args.overwrite and args.output.is_file()):
        raise UsageError(f"`{args.output}` exists. Give another file, or pass `--overwrite` to replace it.")
    args.output.parent.mkdir(parents=True, exist_ok=True)


def _check_kind(args: argparse.Namespace, predictor: Predictor) -> None:
    kind = predictor.problem_type
    if args.threshold is not None and kind != MULTI_LABEL:
        raise UsageError("`--threshold` is for models with several labels per image; this model has other outputs.")
    if args.top_k is not None and kind == MULTI_LABEL:
        raise UsageError("`--top-k` is for classes; this model gives several labels. Use `--threshold` or `--all`.")
    if (args.top_k is not None or args.all) and kind == REGRESSION:
        raise UsageError("`--top-k` and `--all` are for classes; this model gives values.")


def _plain(one: Prediction) -> dict[str, object]:
    """A prediction for JSON, without empty fields."""
    return {name: value for name, value in asdict(one).items() if value or name in ("file", "labels")}


def _show(out: Output, path: Path | None, table: PredictionTable, good: list[Prediction]) -> None:
    if path is None:
        left = [index for index, name in enumerate(table.header) if name.startswith(("file", "label"))]
        out.table("Predictions", table.header, [table.row(one) for one in good[:_SHOWN]], left)
        if len(good) > _SHOWN:
            out.say(f"... and {len(good) - _SHOWN} more: `--output predictions.csv` writes all of them")
        return
    if table.predictor.problem_type != REGRESSION:
        counts = Counter(label for one in good for label in table.predicted(one))
        out.facts("Images by class", dict(counts.most_common(_SHOWN)))
    out.say(f"{len(good)} images: {path}")
