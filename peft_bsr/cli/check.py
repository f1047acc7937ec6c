"""What is in a dataset: classes, splits, modes, sizes, images that cannot be decoded, duplicates."""

from __future__ import annotations

import argparse

from peft_bsr.cli.images import DATA_HELP, add_columns, add_task, say_findings
from peft_bsr.cli.output import Output
from peft_bsr.data import DataReport, check_images, load_images
from peft_bsr.problem_type import MULTI_LABEL, REGRESSION, TASKS

EXAMPLES = """\
examples:
  peft-bsr check photos
  peft-bsr check labels.csv --label-column species --json
  peft-bsr check faces.csv --label-column age --task regression
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    add_columns(parser)
    add_task(parser)
    parser.add_argument("--workers", type=int, help="threads (default: one per core, at most 8)")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_images(args.data, **columns, problem_type=TASKS.get(args.task))
    report, _ = check_images(data, workers=args.workers, progress=not out.is_json)
    out.note(data.describe())
    _say_labels(report, data.labels, out)
    spread = {
        name: " to ".join(str(v) for v in (low, high)) + f", median {median}"
        for name, (low, median, high) in (("width, px", report.widths), ("height, px", report.heights))
    }
    out.facts("Images", {"modes": ", ".join(f"{mode} ({n})" for mode, n in report.modes.items()), **spread})
    say_findings(report, out)
    return report.to_dict()


def _say_labels(report: DataReport, labels: list[str], out: Output) -> None:
    """Print the images by class, or the values of a regression."""
    if report.problem_type == REGRESSION:
        columns = ("value", "split", "least", "median", "largest", "mean", "deviation")
        named = [(name, split, own) for split, values in report.values.items() for name, own in values.items()]
        values = [(name, split, *(f"{own[key]:.4g}" for key in columns[2:])) for name, split, own in named]
        out.table(f"{report.name}: values", columns, values, (0, 1))
        return
    splits = list(report.counts)
    rows = [(label, *(report.counts[split][label] for split in splits)) for label in labels]
    several = ", several labels per image" if report.problem_type == MULTI_LABEL else ""
    out.table(f"{report.name}: images by class{several}", ("class", *splits), [*rows, ("all", *report.images.values())])
