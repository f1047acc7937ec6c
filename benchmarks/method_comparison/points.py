"""Write the points that the app shows: one for each experiment and task, with the command that measured it.

python benchmarks/method_comparison/points.py [--protocol cpu] [--output peft_bsr/app/benchmark.json]
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).parent))
from data import Protocol
from launch import HERE, add_results, results_of
from report import Row, conditions, load_rows

from peft_bsr.app.results import plan_key
from peft_bsr.cost.proxy import on_meta, resolve_narrow
from peft_bsr.tuners import BSRConfig


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="cpu", help="default cpu")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "peft_bsr" / "app" / "benchmark.json")
    add_results(parser)
    args = parser.parse_args()
    args.output.write_text(json.dumps(benchmark(results_of(args), Protocol.load(args.protocol)), indent=1) + "\n")
    print(args.output)


def benchmark(results: Path, protocol: Protocol) -> dict[str, Any]:
    """All experiments with an accuracy and a cost, and the conditions of the measurement."""
    costs = json.loads((results / "costs.json").read_text())
    rows = [
        (task, row)
        for task in protocol.reported_tasks
        for row in load_rows(results, task, costs)
        if row.cost is not None
    ]
    by_task: dict[str, list[Row]] = {}
    for task, row in rows:
        by_task.setdefault(task, []).append(row)
    return {
        "conditions": conditions(protocol, by_task),
        "model": rows[0][1].runs[0]["meta_info"]["model_info"]["model"],
        "points": [point(task, row, protocol) for task, row in rows],
    }


def point(task: str, row: Row, protocol: Protocol) -> dict[str, Any]:
    """Figures of one experiment on one task."""
    assert row.cost is not None, "rows without are left out"
    model = row.runs[0]["meta_info"]["model_info"]["model"]  # not run.py's default
    words = ["--only", row.experiment.name, "--tasks", task, "--protocol", protocol.name, "--model", model]
    return {
        "task": task,
        "experiment": row.experiment.name,
        "accuracies": list(row.accuracies.values()),
        "peak_bytes": row.cost["peak_bytes"],
        "step_to_full": row.cost["step_to_full"],
        "plan": _key_of(row),
        "command": shlex.join(["python", "benchmarks/method_comparison/run.py", *words, "--data", "DATA"]),
    }


def _key_of(row: Row) -> str | None:
    """What trains on which tokens, in the planner's terms; None if the planner does not offer it."""
    config = row.experiment.adapter()
    if row.experiment.name.startswith("full_finetuning/"):
        return plan_key(None, None)
    if not isinstance(config, BSRConfig):
        return None
    with torch.device("meta"):
        tiny = ViTForImageClassification(ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768))
    return plan_key(config, resolve_narrow(on_meta(tiny), config).plan)


if __name__ == "__main__":
    main()
