"""Draw which patches of images an adapter keeps after each reduction, and print its predictions."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase
from peft import PeftModel

from peft_bsr.cli.images import check_at_least
from peft_bsr.cli.measurements import reduces_in_use
from peft_bsr.cli.output import Output
from peft_bsr.cli.prediction_table import PredictionTable
from peft_bsr.cli.sources import find_adapter
from peft_bsr.data import image_name, load_unlabelled, open_image, stored, to_pictures, to_pixels
from peft_bsr.errors import UsageError
from peft_bsr.hub import load, load_image_processor
from peft_bsr.prediction import at_size, to_prediction, to_predictor
from peft_bsr.viz import draw_kept, kept_token_pictures

EXAMPLES = """\
examples:
  peft-bsr show cat.jpg dog.jpg --model outputs/train/adapter
  peft-bsr show leaf.png --model me/beans-bsr --output leaf.svg
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, or one table or dataset")
    parser.add_argument("--model", required=True, metavar="ADAPTER", help="Hub id or folder of an adapter")
    parser.add_argument("--image-size", type=int, help="side length in pixels (default: as in training)")
    parser.add_argument("--base", help="base model, if the one that the adapter names cannot be read")
    parser.add_argument("--split", help="split of a dataset (default: all)")
    parser.add_argument("--image-column", metavar="NAME", help="column of images or paths (default: the only one)")
    parser.add_argument("--limit", type=int, default=16, help="maximum number of images (default 16)")
    parser.add_argument("--output", type=Path, default=Path("kept_tokens.png"), help="default kept_tokens.png")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    check_at_least(args, image_size=1)
    ending = args.output.suffix
    if ending and ending[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise UsageError(f"`--output {args.output}`: no picture ends in `{ending}`. Use .png or .pdf.")
    rows = stored(load_unlabelled(args.images, image_column=args.image_column, split=args.split))
    sources = rows[: args.limit]["image"]
    if len(rows) > len(sources):
        out.note(f"drawn: the first {len(sources)} of {len(rows)} images (`--limit`)")
    names = [image_name(source) or f"row {index}" for index, source in enumerate(sources)]
    images = [open_image(source) for source in sources]
    if find_adapter(args.model) is None:
        raise UsageError(f"`{args.model}` is a model, not an adapter: it keeps all tokens.")
    model: PeftModel = load(args.model, base=args.base, image_size=args.image_size)
    if not reduces_in_use(model):
        raise UsageError(f"`{args.model}` keeps all tokens in evaluation: there is nothing to show.")
    processor = at_size(load_image_processor(args.model, base=args.base), args.image_size)
    pixels = to_pixels(images, processor)
    predictor = to_predictor(model, processor, name=args.model)
    found = [to_prediction(predictor, *one) for one in zip(names, predictor.run(pixels), strict=True)]
    table = PredictionTable(predictor, top_k=1)
    seen = [table.row(one) for one in found]
    pictures = to_pictures(pixels, processor)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    drawn = kept_token_pictures(model, pixels, pictures)
    draw_kept(drawn, pictures, args.output, [row[1] for row in seen])
    kept = {str(one.block): one.share for one in drawn}
    out.table("Seen", table.header, seen, [i for i, name in enumerate(table.header) if name in ("file", "label")])
    out.facts("Patches kept", {f"block {block}": f"{share:.0%}" for block, share in kept.items()})
    out.say(f"picture: {args.output}")
    answers = [
        {"image": one.file, "label": row[1], "probability": one.probability}
        for one, row in zip(found, seen, strict=True)
    ]
    return {"model": args.model, "images": answers, "kept": kept, "picture": str(args.output)}
