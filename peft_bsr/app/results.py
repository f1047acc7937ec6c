"""Results of the benchmark: selection, Pareto front, and accuracies of a plan."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from peft_bsr.engine import Plan
from peft_bsr.tuners import BSRConfig

AXES = {  # cost -> (attribute of a point, divisor for the unit)
    "peak memory, MiB": ("peak_bytes", 2**20),
    "step, full fine-tuning = 1": ("step_to_full", 1),
}


@dataclass(frozen=True)
class Point:
    """An experiment on a dataset.

    Attributes:
        task: Name of the dataset.
        experiment: `"method/variant"`.
        accuracies: Accuracy on the test images for each seed, in 0 to 1.
        peak_bytes: Peak memory of a training step, without the weights.
        step_to_full: Time of a training step over that of full fine-tuning, whose steps alternated with it.
        plan: What is trained on which tokens, see `plan_key`; None if the planner has no such plan.
        command: Command that measured it.
    """

    task: str
    experiment: str
    accuracies: tuple[float, ...]
    peak_bytes: int
    step_to_full: float
    plan: str | None
    command: str

    @property
    def method(self) -> str:
        """First part of `experiment`."""
        return self.experiment.split("/")[0]

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the seeds."""
        return mean(self.accuracies)

    def cost(self, axis: str) -> float:
        """Cost in the unit of `axis`, one of `AXES`."""
        name, unit = AXES[axis]
        return float(getattr(self, name)) / unit


@cache
def _benchmark() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(__file__).parent / "benchmark.json").read_text(encoding="utf-8"))
    return found


@cache
def points() -> tuple[Point, ...]:
    """All measured points; written by `benchmarks/method_comparison/points.py`."""
    return tuple(Point(**one | {"accuracies": tuple(one["accuracies"])}) for one in _benchmark()["points"])


def conditions() -> str:
    """Model, machine and images of the benchmark, as text."""
    return str(_benchmark()["conditions"])


def choose(task: str, methods: Collection[str] = (), memory: float | None = None) -> list[Point]:
    """The points of a dataset.

    Args:
        task: Name of the dataset.
        methods: Methods to show. Default: all.
        memory: Maximum peak memory in MiB. Default None: no limit.
    """
    of_task = [point for point in points() if point.task == task and (not methods or point.method in methods)]
    return [point for point in of_task if memory is None or point.peak_bytes / 2**20 <= memory]


def pareto(chosen: Sequence[Point], axis: str) -> list[Point]:
    """Pareto front: points for which no cheaper point is at least as accurate, cheapest first.

    Args:
        chosen: Points of one dataset.
        axis: One of `AXES`.
    """
    front: list[Point] = []
    for point in sorted(chosen, key=lambda point: (point.cost(axis), -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def plan_key(config: BSRConfig | None, plan: Plan | None) -> str:
    """What is trained on which tokens: plans with the same key compute the same gradients, with different memory.

    Args:
        config: Configuration, or None for full fine-tuning.
        plan: Its plan for the blocks of a model.
    """
    if config is None or plan is None:
        return "full"
    blocks = [index for index, block in enumerate(plan.blocks) if block.trained]
    what = f"{config.trainable} {blocks} {config.target_modules or 'all'} without {config.exclude_modules or 'none'}"
    what += f", rank {config.r} alpha {config.lora_alpha}" if config.trainable == "lora" else ""
    found = {i: block.reduction for i, block in enumerate(plan.blocks) if block.reduction}
    tokens = {i: (r.keep_rate, "merge" if r.merges else ("drop", "fuse")[r.fuse], r.score) for i, r in found.items()}
    how = f"gradients of {config.gradient_tokens}, {config.saved_activations}"
    return f"{len(plan.blocks)} blocks: {what}, {tokens}, {how}"


def measured(key: str, depth: int) -> dict[str, float]:
    """Dataset -> mean accuracy of the benchmark experiments with this key.

    Args:
        key: Key from `plan_key`.
        depth: Number of blocks of the model; the model of the benchmark has 12, for others the result is empty.
    """
    if depth != 12:
        return {}
    found: dict[str, list[float]] = {}
    for point in points():
        if point.plan == key:
            found.setdefault(point.task, []).extend(point.accuracies)
    return {task: mean(accuracies) for task, accuracies in found.items()}


__all__ = ["AXES", "Point", "choose", "conditions", "measured", "pareto", "plan_key", "points"]
