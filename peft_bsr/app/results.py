"""The benchmark's results: which to show, which of them nothing beats, and where a plan was measured."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean

from peft_bsr.engine import Plan
from peft_bsr.tuners import BSRConfig

AXES = {  # what an accuracy is bought with -> (attribute of a point, what its unit is divided by)
    "peak memory, MiB": ("peak_bytes", 2**20),
    "training time, s": ("train_seconds", 1),
    "time of a step, s": ("step_seconds", 1),
}


@dataclass(frozen=True)
class Point:
    """An experiment on a set of images.

    Attributes:
        task: The set.
        experiment: `"method/variant"`.
        accuracies: On the test images, one a seed, in 0 to 1.
        peak_bytes: Of a training step, beside the weights.
        step_seconds: Of a training step.
        train_seconds: Of the whole training, median over the seeds.
        plan: What trains on which tokens, see `plan_key`; None where it is no plan of the planner's.
        command: What measured it.
    """

    task: str
    experiment: str
    accuracies: tuple[float, ...]
    peak_bytes: int
    step_seconds: float
    train_seconds: float
    plan: str | None
    command: str

    @property
    def method(self) -> str:
        """The first part of `experiment`."""
        return self.experiment.split("/")[0]

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return mean(self.accuracies)

    def cost(self, axis: str) -> float:
        """In the unit of `axis`, one of `AXES`."""
        name, unit = AXES[axis]
        return float(getattr(self, name)) / unit


@cache
def _benchmark() -> dict[str, object]:
    return dict(json.loads((Path(__file__).parent / "benchmark.json").read_text(encoding="utf-8")))


@cache
def points() -> tuple[Point, ...]:
    """All that were measured, losing ones too; written by `benchmarks/method_comparison/points.py`."""
    found: list[dict] = _benchmark()["points"]  # type: ignore[assignment]
    return tuple(Point(**one | {"accuracies": tuple(one["accuracies"])}) for one in found)


def conditions() -> str:
    """Model, machine and images of the benchmark, in words."""
    return str(_benchmark()["conditions"])


def choose(task: str, methods: Collection[str] = (), memory: float | None = None) -> list[Point]:
    """The points of a set of images.

    Args:
        task: The set.
        methods: Only these. Default: all.
        memory: MiB that the peak may have at most. Default None: any.
    """
    of_task = [point for point in points() if point.task == task and (not methods or point.method in methods)]
    return [point for point in of_task if memory is None or point.peak_bytes / 2**20 <= memory]


def pareto(chosen: Sequence[Point], axis: str) -> list[Point]:
    """Those that no other point beats: none is at least as accurate for less. Cheapest first.

    Args:
        chosen: Points of one set of images.
        axis: One of `AXES`.
    """
    front: list[Point] = []
    for point in sorted(chosen, key=lambda point: (point.cost(axis), -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def plan_key(config: BSRConfig | None, plan: Plan | None) -> str:
    """What trains on which tokens: plans of the same key compute the same gradients, whatever they keep in memory.

    Args:
        config: None for full fine-tuning.
        plan: What it does to each block of a model.
    """
    if config is None or plan is None:
        return "full"
    blocks = [index for index, block in enumerate(plan.blocks) if block.trained]
    reductions = {i: block.reduction.keep_rate for i, block in enumerate(plan.blocks) if block.reduction}
    return f"{len(plan.blocks)} blocks: {config.trainable} {blocks}, {reductions}"


def measured(key: str, depth: int) -> dict[str, float]:
    """Set of images -> accuracy of the benchmark's plan of this key, the mean of its experiments.

    Args:
        key: Of `plan_key`.
        depth: Blocks of the model; the benchmark's has 12, and says nothing of others.
    """
    if depth != 12:
        return {}
    found: dict[str, list[float]] = {}
    for point in points():
        if point.plan == key:
            found.setdefault(point.task, []).extend(point.accuracies)
    return {task: mean(accuracies) for task, accuracies in found.items()}


__all__ = ["AXES", "Point", "choose", "conditions", "measured", "pareto", "plan_key", "points"]
