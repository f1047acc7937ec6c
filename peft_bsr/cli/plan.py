"""Ways to train a model that fit into a memory budget, found before anything trains; weights are read with `--data`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from peft_bsr.backbones import native_size
from peft_bsr.cli.images import (
    SIZE_HELP,
    add_columns,
    check_at_least,
    default_size,
    read_processor,
    read_training_data,
)
from peft_bsr.cli.memory import OPTIMIZERS, PRECISIONS
from peft_bsr.cli.output import Output
from peft_bsr.cli.sources import changed, find_adapter, load_model, make_model, model_of, takes_sound
from peft_bsr.cost import BudgetPlan, Contributions, Setup, contributions, plan_for_budget
from peft_bsr.data import collate, with_pixels
from peft_bsr.errors import UsageError
from peft_bsr.training import default_learning_rate

EXAMPLES = """\
examples:
  peft-bsr plan google/vit-base-patch16-224 --memory 2GB
  peft-bsr plan google/vit-large-patch16-224 --memory 8GB --device cuda --precision bf16 --optimizer adamw_8bit --json
  peft-bsr plan google/vit-base-patch16-224 --memory 2GB --data photos --contributions found.json
"""
_BATCHES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder")
    parser.add_argument("--memory", required=True, help='budget, such as "2GB" (10^9) or "1.5GiB" (2^30)')
    parser.add_argument("--data", metavar="DATA", help="images to measure which blocks to train (as for train)")
    file_help = "measured contributions: read from this file, or with --data written to it if it does not exist"
    parser.add_argument("--contributions", type=Path, metavar="JSON", help=file_help)
    add_columns(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default 32)")
    parser.add_argument("--image-size", type=int, help=SIZE_HELP)
    names = f"{', '.join(OPTIMIZERS)} (default adamw_fused)"
    parser.add_argument("--optimizer", default="adamw_fused", choices=OPTIMIZERS, metavar="NAME", help=names)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="bf16, fp16: autocast (default fp32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile; 10 to 30 seconds per plan")
    parser.add_argument("--labels", type=int, default=10, help="classes of the head (default 10)")
    parser.add_argument("--limit", type=int, help="maximum number of plans (default: all)")
    parser.add_argument("--device", default="cpu", help="device that trains (default cpu)")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    check_at_least(args, batch_size=1, image_size=1, labels=1)
    source = model_of(find_adapter(args.model), args.model)
    found = _contributions(source, args, out)
    model = make_model(source, args.labels, "meta")
    setup = Setup(
        batch_size=args.batch_size,
        image_size=args.image_size or trained_size(model.config, source),
        optimizer=args.optimizer,
        device=args.device,
        autocast=PRECISIONS[args.precision],
        compile=args.compile,
    )
    with out.doing("running steps without memory"):
        plans = plan_for_budget(model, args.memory, setup, limit=args.limit, contributions=found)
    rows = [
        (
            str(number),
            f"{plan.estimate.total_bytes / 2**20:.0f}",
            f"{plan.estimate.training_flops / args.batch_size / 1e9:.3g}",
            f"{plan.estimate.trainable_parameters / 1e6:.2f}",
            *([] if found is None else [f"{plan.share:.0%}"]),
            plan.gives_up,
        )
        for number, plan in enumerate(plans, 1)
    ]
    columns = ("", "peak, MiB", "GFLOPs per image", "trained, M", *(["gains"] if found else []), "gives up")
    first = "ordered by what they give up" if found is None else "ordered by gain, whole weights and low-rank updates"
    out.table(f"{source}, {args.memory}, batch {args.batch_size}: {first}", columns, rows, (0, len(columns) - 1))
    if takes_sound(model.config):
        out.note("`peft-bsr train` reads images: use the options of these plans in Python, as in examples/sound.py")
    data = ["--dataset", args.data or "DATA"]
    data += [] if args.image_column is None else ["--image-column", args.image_column]
    data += [] if args.label_column is None else ["--label-column", args.label_column]
    for number, plan in enumerate(plans, 1):
        out.line(f"{number:>2}  {command_of(plan, source, data)}")
        for reason in plan.declined:
            out.line(f"    declined: {reason}")
    for number, plan in enumerate(plans, 1):
        if plan.is_recommended:
            out.say(f"Try plan {number} first: it is preset=balanced, the most accurate for its cost in our benchmark.")
    out.say("Python and torch come on top (about 0.4 GB on the CPU). Only training shows which plan is best for you.")
    return {
        "model": source,
        "memory": args.memory,
        "batch_size": args.batch_size,
        "plans": [_row(p) | {"command": command_of(p, source, data)} for p in plans],
    }


def _contributions(source: str, args: argparse.Namespace, out: Output) -> Contributions | None:
    """Contributions of the blocks, measured or read from a file; None if neither was requested."""
    file: Path | None = args.contributions
    if file is not None and file.exists():
        out.note(f"the contributions of the blocks are read from {file}")
        return Contributions.load(file)
    if args.data is None:
        if file is not None:
            raise UsageError(f"`--contributions {file}`: there is no such file. Pass `--data` to measure and write it.")
        return None
    wanted = {"dataset": args.data, "task": None, "test_size": None, "validation_size": None, "skip_bad": None}
    settings = argparse.Namespace(**wanted, image_column=args.image_column, label_column=args.label_column)
    data = read_training_data(settings, out, at_most=_BATCHES * args.batch_size)
    processor = read_processor(source, out, image_size=args.image_size)
    model = load_model(source, data.labels, data.problem_type, args.image_size)
    found = contributions(
        model,
        with_pixels(data.train, processor),
        _BATCHES,
        batch_size=args.batch_size,
        collate=collate,
        progress=not out.is_json,
    )
    args.labels = len(data.labels)
    if file is not None:
        out.note(f"written: {found.save(file)}")
    return found


def trained_size(config: PreTrainedConfig, source: str) -> int | None:
    """Image size that `train` uses if it differs from the configuration (DINOv2: 224, not 518), or None."""
    size = default_size(source)
    return None if size is None or native_size(config) in (None, (size, size)) else size


def _row(plan: BudgetPlan) -> dict[str, object]:
    estimate = plan.estimate
    return {
        "method": "full" if plan.config is None else "bsr",
        "options": {} if plan.config is None else changed(plan.config),
        "optimizer": plan.setup.optimizer,
        "gradient_checkpointing": plan.setup.gradient_checkpointing,
        "gives_up": plan.gives_up,
        "recommended": plan.is_recommended,
        "contribution_share": plan.share,
        "declined": list(plan.declined),
        "peak_bytes": estimate.total_bytes,
        "saved_bytes": estimate.saved_bytes,
        "host_bytes": estimate.host_bytes,
        "training_flops": estimate.training_flops,
        "trainable_parameters": estimate.trainable_parameters,
    }


def command_of(plan: BudgetPlan, source: str, data: Sequence[str]) -> str:
    """The `peft-bsr train` command of a plan. Without images of its own, `data`, it would train on the digits."""
    setup, options = plan.setup, {} if plan.config is None else changed(plan.config)
    method = "full" if plan.config is None else "bsr"
    words = ["peft-bsr", "train", "--model", source, *(["--method", method] if method != "bsr" else [])]
    for name, value in options.items():
        words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    words += ["--learning-rate", f"{default_learning_rate(method, options):g}", "--batch-size", str(setup.batch_size)]
    words += ["--image-size", str(setup.image_size)] if setup.image_size else []
    words += [
        word
        for name, dtype in PRECISIONS.items()
        if dtype and dtype is setup.autocast
        for word in ("--precision", name)
    ]
    words += ["--compile"] if setup.compile else []
    pairs = [*OPTIMIZERS[setup.optimizer]]
    if setup.gradient_checkpointing:
        offload = ', "offload": true' if setup.gradient_checkpointing == "offload" else ""
        pairs += ["gradient_checkpointing=true", f'gradient_checkpointing_kwargs={{"use_reentrant": false{offload}}}']
    return shlex.join([*words, *(word for pair in pairs for word in ("--trainer", pair)), *data])
