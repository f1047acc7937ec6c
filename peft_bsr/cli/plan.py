"""Ways to train a model that fit into a memory budget, found before anything runs and without the weights."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

import torch

from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import changed, find_adapter, make_model, model_of
from peft_bsr.cost import BudgetPlan, plan_for_budget

EXAMPLES = """\
examples:
  peft-bsr plan google/vit-base-patch16-224 --memory 2GB
  peft-bsr plan google/vit-large-patch16-224 --memory 6GiB --batch-size 64 --dtype bfloat16 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder")
    parser.add_argument("--memory", required=True, help='budget, such as "2GB" (10^9) or "1.5GiB" (2^30)')
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--image-size", type=int, help="pixels (default: the model's)")
    parser.add_argument("--optimizer", default="adamw", help="adamw, sgd_momentum or sgd (default adamw)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's")
    parser.add_argument("--labels", type=int, default=10, help="classes of the head (default 10)")
    parser.add_argument("--limit", type=int, help="stop after so many ways (default: all)")
    parser.add_argument("--device", default="cpu", help="whose operations are counted (default cpu)")


def run(args: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Run the command."""
    source = model_of(find_adapter(args.model), args.model)
    model = make_model(source, args.labels, "meta")
    with out.doing("running steps without memory"):
        plans = plan_for_budget(
            model,
            args.memory,
            batch_size=args.batch_size,
            image_size=args.image_size,
            optimizer=args.optimizer,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            device=args.device,
            limit=args.limit,
        )
    rows = [
        (
            str(number),
            f"{plan.estimate.total_bytes / 2**20:.0f}",
            f"{plan.estimate.training_flops / args.batch_size / 1e9:.3g}",
            f"{plan.estimate.trainable_parameters / 1e6:.2f}",
            plan.gives_up,
        )
        for number, plan in enumerate(plans, 1)
    ]
    columns = ("", "peak, MiB", "GFLOPs an image", "trained, M", "gives up")
    out.table(f"{source}, {args.memory}, batch {args.batch_size}: what gives up least first", columns, rows, (0, 4))
    train = f"peft-bsr train --model {shlex.quote(source)} --batch-size {args.batch_size}"
    for number, plan in enumerate(plans, 1):
        command = "Trainer without an adapter" if plan.config is None else train  # which trains adapters only
        out.line(f"{number:>2}  {' '.join([command, *_flags(plan)])}")
    out.say("Python and torch come on top (about 0.4 GB on the CPU). Which plan is best on your images, a run can say.")
    return {"model": source, "memory": args.memory, "batch_size": args.batch_size, "plans": [_row(p) for p in plans]}


def _row(plan: BudgetPlan) -> dict[str, Any]:
    estimate = plan.estimate
    return {
        "method": "full" if plan.config is None else "bsr",
        "options": {} if plan.config is None else changed(plan.config),
        "gradient_checkpointing": plan.gradient_checkpointing,
        "gives_up": plan.gives_up,
        "peak_bytes": estimate.total_bytes,
        "saved_bytes": estimate.saved_bytes,
        "training_flops": estimate.training_flops,
        "trainable_parameters": estimate.trainable_parameters,
    }


def _flags(plan: BudgetPlan) -> list[str]:
    """What `peft-bsr train` is told to run a plan."""
    flags = []
    for name, value in changed(plan.config).items() if plan.config else ():
        flags += ["--set", shlex.quote(f"{name}={value if isinstance(value, str) else json.dumps(value)}")]
    return flags + (["--trainer", "gradient_checkpointing=true"] if plan.gradient_checkpointing else [])
