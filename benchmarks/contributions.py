"""Which blocks the planner selects by a task's own images, in the memory of the paper's plan, and how long that takes.

    python benchmarks/contributions.py --model MODEL --data DATA --tasks cifar10 fashion-mnist

For each task, the contributions of the blocks are measured on the protocol's training images. Among the plans with at
most the peak of `bsr/spread-exact` ({3, 7, 11}, half of the tokens kept three times: 1/6 of full fine-tuning's
activations), the best of each form becomes an experiment, `bsr_chosen/TASK-full` and `bsr_chosen/TASK-lora`:

    python benchmarks/method_comparison/run.py --tasks cifar10 --only bsr_chosen/cifar10-full bsr_chosen/cifar10-lora
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "method_comparison"))
import transformers
from data import Protocol, load_task, with_pixels
from experiment import EXPERIMENTS, Experiment, load_base
from train import add_sources

from peft_bsr.cost import BudgetPlan, Setup, contributions, estimate, plan_for_budget
from peft_bsr.data import collate

PAPER = "bsr/spread-exact"
RECIPES = {"full": "bsr_spread", "lora": "lora_all"}


def main() -> None:
    """Measure, search, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", help="see data.py (default: the protocol's)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "contributions")
    add_sources(parser)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    protocol = Protocol.load(args.protocol)
    args.results.mkdir(parents=True, exist_ok=True)
    for task in args.tasks or protocol.tasks:
        print(json.dumps(choose(task, protocol, args), indent=2))


def choose(task: str, protocol: Protocol, args: argparse.Namespace) -> dict[str, Any]:
    """The best plan of each form."""
    images = load_task(task, protocol, args.data)["train"]
    model = load_base(args.model, images.features["label"].names)
    begin = _clocks()
    found = contributions(model, with_pixels(images, args.model), batch_size=protocol.batch_size, collate=collate)
    measured = _clocks()
    found.save(args.results / f"{task}.json")
    setup = Setup(batch_size=protocol.batch_size)
    paper = estimate(model, Experiment.load(PAPER).adapter(), setup)
    plans = plan_for_budget(model, int(paper.total_bytes * 1.05) + 1, setup, contributions=found)
    searched = _clocks()
    full = estimate(model, None, setup)
    result = {
        "task": task,
        "images": found.images,
        "seconds_to_measure": _between(begin, measured),
        "seconds_to_search": _between(measured, searched),
        "saved_of_full": {PAPER: round(paper.saved_bytes / full.saved_bytes, 3)},
        "peak_bytes": {PAPER: paper.total_bytes},
        "plans": [plan.describe() for plan in plans],
    }
    for form in RECIPES:
        plan = next((plan for plan in plans if plan.config is not None and plan.config.trainable == form), None)
        if plan is not None:
            name = write(plan, f"bsr_chosen/{task}-{form}", form)
            result["saved_of_full"][name] = round(plan.estimate.saved_bytes / full.saved_bytes, 3)
            result["peak_bytes"][name] = plan.estimate.total_bytes
    (args.results / f"{task}-plans.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _between(begin: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    """Wall time and processor time; on a busy machine wall time means little."""
    return {name: round(b - a, 1) for name, a, b in zip(("wall", "processor"), begin, end, strict=True)}


def write(plan: BudgetPlan, name: str, form: str) -> str:
    """Write the plan as an experiment."""
    folder = EXPERIMENTS / name
    folder.mkdir(parents=True, exist_ok=True)
    assert plan.config is not None
    fields = ("trainable_blocks", "reduction_blocks", "keep_rate", "trainable", "lean", "saved_activations")
    config = {"peft_type": "BSR", **{field: getattr(plan.config, field) for field in fields}}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "training_params.json").write_text(json.dumps({"recipe": RECIPES[form], "main": True}, indent=2) + "\n")
    return name


if __name__ == "__main__":
    main()
