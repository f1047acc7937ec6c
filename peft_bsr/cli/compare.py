"""Methods side by side on a model: memory, compute and time of a training step, measured here on random images.

Only the model's configuration is read; weights are random, which changes nothing of what is measured.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_bsr.backbones import input_shapes, main_input, probe_column, probe_inputs
from peft_bsr.cli.findings import FULL, conditions
from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import METHODS, find_adapter, make_config, make_model, model_of
from peft_bsr.cli.values import read_pairs
from peft_bsr.cost import compare, cost_rows
from peft_bsr.errors import PeftBsrError, UsageError, one_line

_OTHERS = {"full": FULL, "lora": "LoRA r=8, every Linear"}
EXAMPLES = """\
examples:
  peft-bsr compare google/vit-base-patch16-224
  peft-bsr compare facebook/dinov2-small --methods full bsr --set lean=max --batch-size 4 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder")
    names = [*_OTHERS, *METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, help=f"default {' '.join(names)}")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="option of bsr, may be repeated")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default 8)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each (default 5)")
    parser.add_argument("--labels", type=int, default=10, help="classes of the head (default 10)")
    parser.add_argument("--device", default=default_device(), help="default: cuda or mps where there is one, else cpu")


def default_device() -> str:
    """The fastest kind of device here."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def run(args: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Run the command."""
    if min(args.batch_size, args.repeats, args.labels) < 1:
        raise UsageError("`--batch-size`, `--repeats` and `--labels` must be at least 1.")
    source = model_of(find_adapter(args.model), args.model)
    options = read_pairs(args.set or [])
    models: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    with out.doing("making the models"):
        for method in args.methods:
            try:
                models[_OTHERS.get(method, method)] = _attach(source, method, options, args)
            except PeftBsrError as error:
                if method == "bsr" or len(args.methods) == 1:  # what was asked for with options
                    raise
                refused[method] = one_line(error)
    first = next(iter(models.values()))
    inputs = probe_inputs(first, args.batch_size, input_shapes(first)[-1])
    batch = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    batch["labels"] = torch.randint(args.labels, (args.batch_size,), device=args.device)
    with out.doing(f"measuring {len(models)} models"):
        costs = compare(models, batch, args.repeats)
    out.table(f"A training step of {source}", *cost_rows(costs))
    for method, why in refused.items():
        out.say(f"{method} does not take this model: {why}")
    stands = conditions(batch[main_input(first)])
    out.say(stands)
    return {
        "model": source,
        "costs": {name: vars(cost) for name, cost in costs.items()},
        "refused": refused,
        "conditions": stands,
    }


def _attach(source: str, method: str, options: dict[str, Any], args: argparse.Namespace) -> nn.Module:
    model: Any = make_model(source, args.labels)
    if method == "lora":
        heads = [n for n in probe_column(model.eval()).head if isinstance(model.get_submodule(n), nn.Linear)]
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=heads))
    elif method != "full":
        model = get_peft_model(model, make_config(method, options if method == "bsr" else {}))
    return model.to(args.device).train()
