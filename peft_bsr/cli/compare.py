"""Methods side by side on a model: memory, compute and time of a training step; with a dataset, accuracy too.

Without a dataset only the model's configuration is read; weights and images are random, which does not affect the
costs. With a dataset, every method is trained on it for a short time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from peft_bsr.backbones import input_shapes, probe_inputs
from peft_bsr.cli.images import (
    SIZE_HELP,
    add_columns,
    add_sizes,
    add_task,
    check_at_least,
    default_size,
    read_processor,
    read_training_data,
)
from peft_bsr.cli.measurements import FULL, conditions, in_words
from peft_bsr.cli.methods import attach, check_method
from peft_bsr.cli.output import Output
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.sources import find_adapter, make_model, model_of, refuse_sound
from peft_bsr.cli.trial import Trial, bounded, run_trial
from peft_bsr.cli.values import read_pairs
from peft_bsr.cost import Cost, compare, cost_rows
from peft_bsr.data import LabelledImages, collate, with_pixels
from peft_bsr.errors import PeftBsrError, UsageError, one_line
from peft_bsr.prediction import find_device
from peft_bsr.problem_type import SINGLE_LABEL
from peft_bsr.tuners import METHODS

_OTHERS = {"full": FULL, "linear": "linear probe", "lora": "LoRA r=8, every Linear"}
_OF_RANDOM: dict[str, float] = {"batch_size": 8, "labels": 10}
_OF_DATA: dict[str, float] = {"batch_size": 32, "epochs": 3.0, "images": 1000, "seconds": 120.0}
EXAMPLES = """\
examples:
  peft-bsr compare google/vit-base-patch16-224
  peft-bsr compare facebook/dinov2-small --methods full bsr --set lean=max --batch-size 4 --json
  peft-bsr compare google/vit-base-patch16-224-in21k --dataset photos --output comparison.json
  peft-bsr compare facebook/dinov2-small --dataset beans --methods linear lora bsr --set preset=balanced --seconds 60
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hub id or folder")
    add("--dataset", metavar="DATA", help="train each method for a short time on these images, and give its accuracy")
    add_columns(parser)
    add_task(parser)
    add_sizes(parser)
    add("--epochs", type=float, help=f"with --dataset, maximum number (default {_OF_DATA['epochs']:g})")
    add("--images", type=int, help=f"with --dataset, maximum per split (default {_OF_DATA['images']})")
    add("--seconds", type=float, help=f"with --dataset, training time per method (default {_OF_DATA['seconds']:g})")
    names = [*_OTHERS, *METHODS]
    add("--methods", nargs="+", choices=names, default=names, help=f"default {' '.join(names)}")
    add("--set", action="append", metavar="NAME=VALUE", help="option of bsr; may be repeated")
    add("--batch-size", type=int, help="images per step (default 8, with --dataset 32)")
    add("--image-size", type=int, help=SIZE_HELP)
    add("--repeats", type=int, default=5, help="timed steps per method (default 5)")
    add("--labels", type=int, help="without --dataset, classes of the head (default 10)")
    add("--device", default=find_device(None), help="default: cuda or mps if available, else cpu")
    add("--output", type=Path, metavar="JSON", help="also write the output of --json to this file")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    _check(args)
    source = model_of(find_adapter(args.model), args.model)
    refuse_sound(source)
    options = read_pairs(args.set or [])
    if "bsr" in args.methods:
        check_method("bsr", options)
    size = args.image_size or default_size(source)
    make_model(source, device="meta", image_size=size)  # an unsupported size is an error, not a refused method
    data = processor = None
    if args.dataset is not None:
        data = read_training_data(args, out, at_most=args.images)
        processor = read_processor(source, out, image_size=args.image_size)
    refused: dict[str, str] = {}
    models = _make(source, size, data, options, args, refused, out)
    begin = time.perf_counter()
    batch = _batch_of(data, processor, args) if data else _random_batch(models, size, args)
    seconds_to_load = time.perf_counter() - begin
    with out.doing(f"measuring {len(models)} models"):
        costs = compare({_name(method): model for method, model in models.items()}, batch, args.repeats)
    measured_on = conditions(next(tensor for tensor in batch.values() if tensor.ndim > 1))
    methods = list(models)
    models.clear()  # free them before others are loaded
    result: dict[str, object] = {"model": source}
    if data is None:
        out.table(f"A training step of {source}", *cost_rows(costs))
    else:
        trials: dict[str, Trial] = {}
        for method in methods:
            needed = costs[_name(method)].step_seconds + seconds_to_load
            settings = bounded(_settings(source, method, options, args), len(data.train), args.seconds, needed)
            out.note(f"{_name(method)}, {methods.index(method) + 1} of {len(methods)}: {settings.max_steps} steps")
            try:
                trials[_name(method)] = run_trial(settings, data, processor, out)
            except (PeftBsrError, torch.OutOfMemoryError) as error:
                refused[method] = one_line(error)
        images = {split: len(rows) for split, rows in data.splits.items()}
        _show(out, f"{source} on {args.dataset}: trained on {images['train']} images", trials, costs, images)
        results = {name: trial.to_dict() for name, trial in trials.items()}
        result |= {"dataset": args.dataset, "images": images, "results": results}
    for method, why in refused.items():
        out.say(f"{method} is left out: {why}")
    out.say(measured_on)
    measured = {name: vars(cost) for name, cost in costs.items()}
    result |= {"costs": measured, "refused": refused, "conditions": measured_on}
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2, ensure_ascii=False), encoding="utf-8")
        out.say(f"written: {args.output}")
    return result


def _check(args: argparse.Namespace) -> None:
    """Check the arguments and fill in defaults, before anything is read."""
    check_at_least(args, batch_size=1, image_size=1, repeats=1, labels=1, images=2)
    for name in ("epochs", "seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"`--{name} {value:g}` must be above 0.")
    here, elsewhere = (_OF_RANDOM, _OF_DATA) if args.dataset is None else (_OF_DATA, _OF_RANDOM)
    for name in elsewhere.keys() - here.keys():
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"`{flag}` is for use {'with' if args.dataset is None else 'without'} `--dataset`.")
    for name, value in here.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.output is not None:
        if args.output.exists():
            raise UsageError(f"`{args.output}` exists. Give another file.")
        args.output.parent.mkdir(parents=True, exist_ok=True)


def _name(method: str) -> str:
    return _OTHERS.get(method, method)


def _make(
    source: str,
    size: int | None,
    data: LabelledImages | None,
    options: dict[str, str],
    args: argparse.Namespace,
    refused: dict[str, str],
    out: Output,
) -> dict[str, nn.Module]:
    """Method -> model with random weights; `refused` gets the reason for each method that does not support it."""
    models: dict[str, nn.Module] = {}
    with out.doing("making the models"):
        for method in args.methods:
            try:
                base = make_model(source, len(data.labels) if data else args.labels, image_size=size)
                base.config.problem_type = data.problem_type if data else SINGLE_LABEL
                model: nn.Module = attach(method, base, options if method == "bsr" else {})
            except PeftBsrError as error:
                if method == "bsr" or len(args.methods) == 1:  # requested with options, or the only method
                    raise
                refused[method] = one_line(error)
            else:
                models[method] = model.to(args.device).train()
    return models


def _random_batch(models: Mapping[str, nn.Module], size: int | None, args: argparse.Namespace) -> dict[str, Tensor]:
    first = next(iter(models.values()))
    shape = input_shapes(first)[-1]
    batch = probe_inputs(first, args.batch_size, shape if size is None else (*shape[:-2], size, size))
    batch["labels"] = torch.randint(args.labels, (args.batch_size,))
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def _batch_of(data: LabelledImages, processor: BaseImageProcessor, args: argparse.Namespace) -> dict[str, Tensor]:
    examples = with_pixels(data.train, processor)
    batch = collate([examples[index] for index in range(min(args.batch_size, len(examples)))])
    return {name: tensor.to(args.device) for name, tensor in batch.items()}


def _settings(source: str, method: str, options: dict[str, str], args: argparse.Namespace) -> TrainSettings:
    return TrainSettings(
        source,
        method=method,
        options=options if method == "bsr" else {},
        epochs=args.epochs,
        batch_size=args.batch_size,
        image_size=args.image_size,
        device=args.device,
    )


def _show(
    out: Output, title: str, trials: Mapping[str, Trial], costs: Mapping[str, Cost], images: Mapping[str, int]
) -> None:
    rows = []
    figure = ""
    for name, trial in trials.items():
        figure, value = next(iter(trial.score.figures().items()))
        peak = [size for key, size in trial.peak.to_dict().items() if key != "device"]
        rows.append(
            (
                name,
                in_words(figure, value),
                f"{trial.epochs:.3g}",
                f"{costs[name].step_seconds:.3g}",
                f"{costs[name].saved_bytes_per_image / 2**20:.3g}",
                " / ".join("-" if size is None else f"{size / 2**20:.0f}" for size in peak),
            )
        )
    figure = figure.replace("_", " ")
    out.table(title, ("", figure, "epochs", "step, s", "saved, MiB", "peak, MiB"), rows)
    out.say(
        f"{figure}: on {images['validation']} validation images after a short run, each method with its own learning "
        "rate; test images are not used. saved: activations kept for backward, per image. peak: predicted / measured "
        "(on a CPU the growth of the process, including images, libraries and freed memory that it keeps)."
    )
