"""Write one file that runs without this package: merged weights, and the token reduction with them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from peft_bsr.cli.images import check_at_least
from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import find_adapter
from peft_bsr.data import size_of
from peft_bsr.errors import UsageError
from peft_bsr.exporting import export
from peft_bsr.hub import load, load_image_processor

EXAMPLES = """\
examples:
  peft-bsr export outputs/train/adapter --output model.onnx
  peft-bsr export me/pets-bsr --format torch.export --output model.pt2 --batch-size 8
  peft-bsr export me/pets-bsr --output model.onnx --quantize int8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="ADAPTER", help="Hub id or folder of an adapter")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--format", choices=("onnx", "torch.export", "executorch"), default="onnx", help="default onnx")
    parser.add_argument("--batch-size", type=int, help="fixed batch (default: any)")
    parser.add_argument("--image-size", type=int, help="side length in pixels (default: as in training)")
    parser.add_argument("--quantize", choices=("int8",), help="weights in 8 bits, for the CPU")
    parser.add_argument("--no-check", action="store_true", help="do not compare its outputs with the model's")
    parser.add_argument("--base", help="base model, if the one that the adapter names cannot be read")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    check_at_least(args, batch_size=1, image_size=1)
    if find_adapter(args.model) is None:
        raise UsageError(f"`{args.model}` is a model, not an adapter. Export it with transformers and optimum.")
    model = load(args.model, base=args.base, image_size=args.image_size)
    processor = load_image_processor(args.model, base=args.base)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with out.doing(f"exporting to {args.output}"):
        report = export(
            model,
            args.format,
            args.output,
            batch_size=args.batch_size,
            image_size=args.image_size or size_of(processor),
            quantize=args.quantize,
            image_processor=processor,
            check=not args.no_check,
        )
    out.say(report.describe())
    return {"model": args.model, **dataclasses.asdict(report), "speedup": report.speedup}
