"""Write an adapter and its base model as one plain model of transformers, which needs neither PEFT nor this package.

Token reduction is not in the weights: the merged model runs on all tokens, and its answers differ a little. With
`--dataset` the accuracy of both is measured; of several labels micro F1, of a regression the mean absolute error.
`peft-bsr export` keeps the reduction.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from peft_bsr.backbones import BackboneForImageClassification
from peft_bsr.cli.images import DATA_HELP, add_scoring, check_at_least, read_scored_data
from peft_bsr.cli.measurements import reduces_in_use
from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import find_adapter
from peft_bsr.core import as_plain
from peft_bsr.errors import ReductionNotMergedWarning, UsageError
from peft_bsr.hub import load, load_image_processor
from peft_bsr.prediction import at_size, open_predictor, to_predictor
from peft_bsr.prediction.scoring import score
from peft_bsr.tuners.base.tuner import MethodTuner

EXAMPLES = """\
examples:
  peft-bsr merge outputs/train/adapter --output outputs/plain
  peft-bsr merge outputs/train/adapter --output outputs/plain2 --dataset beans
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="ADAPTER", help="Hub id or folder of an adapter")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must be new or empty")
    parser.add_argument("--dataset", help=f"measure the accuracy of both on {DATA_HELP}")
    add_scoring(parser)


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    check_at_least(args, batch_size=1, image_size=1, workers=0)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UsageError(f"`{args.output}` exists and is not empty. Give another folder.")
    if find_adapter(args.model) is None:
        raise UsageError(f"`{args.model}` is a model, not an adapter: there is nothing to merge.")
    model: PeftModel = load(args.model, base=args.base, image_size=args.image_size)
    reduces = isinstance(model.base_model, MethodTuner) and reduces_in_use(
        model
    )  # not with methods of PEFT, such as LoRA
    processor = at_size(load_image_processor(args.model, base=args.base), args.image_size)
    images = None
    if args.dataset is not None:
        predictor = to_predictor(model, processor, name=args.model)
        _, images = read_scored_data(args, predictor, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReductionNotMergedWarning)  # printed below, with accuracies if there are images
        plain = model.merge_and_unload()
    _write(plain, processor, args.output)
    out.say(f"{type(plain).__name__}: {args.output}")
    if reduces:
        out.note("It runs on all tokens: token reduction is not part of the weights, so its outputs differ slightly.")
    if isinstance(plain, BackboneForImageClassification):
        out.note("Its classifier is of this package: read it by transformers after `import peft_bsr`.")
    figure, found = "accuracy", {}
    if images is not None:
        for name, source in (("adapter", args.model), ("merged", args.output)):
            figure, found[name] = _figure(source, images, args, out)
        rows = [("adapter" + ", tokens reduced" * reduces, f"{found['adapter']:.4f}")]
        rows.append(("merged, all tokens", f"{found['merged']:.4f}"))
        out.table(f"{len(images)} images of {args.dataset}", ("", figure), rows)
    return {
        "model": args.model,
        "output": args.output,
        "class": type(plain).__name__,
        "reduces": reduces,
        "images": None if images is None else len(images),
        figure: found,
    }


def _figure(source: str | Path, images: Dataset, args: argparse.Namespace, out: Output) -> tuple[str, float]:
    """Name and value of the main metric of a saved model."""
    predictor = open_predictor(source, base=args.base, device=args.device, image_size=args.image_size)
    found = score(predictor, images, batch_size=args.batch_size, workers=args.workers, progress=not out.is_json)
    return next(iter(found.figures().items()))


def _in_one_dtype(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights in the widest of their dtypes: `frozen_weights` rounds some of them."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    dtype = max((t.dtype for t in weights.values() if t.is_floating_point()), key=lambda one: one.itemsize)
    model.config.dtype = dtype
    return {name: as_plain(t, dtype) if t.is_floating_point() else t for name, t in weights.items()}


def _write(model: PreTrainedModel, processor: BaseImageProcessor, folder: Path) -> None:
    """Write weights, configuration and image processor; the folder appears when all of them are written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
        made = Path(draft) / "model"
        model.save_pretrained(made, state_dict=_in_one_dtype(model))
        processor.save_pretrained(made)
        os.replace(made, folder)
