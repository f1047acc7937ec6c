"""What is in a data set: classes, splits, modes, sizes, images that cannot be decoded, duplicates."""

from __future__ import annotations

import argparse
from typing import Any

from peft_bsr.cli.images import DATA_HELP, add_columns, say_findings
from peft_bsr.cli.output import Output
from peft_bsr.data import check_images, load_images

EXAMPLES = """\
examples:
  peft-bsr check photos
  peft-bsr check labels.csv --label-column species --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    add_columns(parser)
    parser.add_argument("--workers", type=int, help="threads (default: one a core, 8 at most)")


def run(args: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Run the command."""
    data = load_images(args.data, image_column=args.image_column, label_column=args.label_column)
    report, _ = check_images(data, workers=args.workers, progress=not out.is_json)
    splits = list(report.counts)
    rows = [(label, *(report.counts[split][label] for split in splits)) for label in data.labels]
    total = ("all", *(sum(report.counts[split].values()) for split in splits))
    out.table(f"{args.data}: images by class", ("class", *splits), [*rows, total])
    spread = {
        name: " to ".join(str(v) for v in (low, high)) + f", median {median}"
        for name, (low, median, high) in (("width, px", report.widths), ("height, px", report.heights))
    }
    out.facts("Images", {"modes": ", ".join(f"{mode} ({n})" for mode, n in report.modes.items()), **spread})
    say_findings(report, out)
    return report.to_dict()
