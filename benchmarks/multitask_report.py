"""The tables of docs/multitask.md from the results of `multitask.py`; rows without results are left out."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "multitask.md"
BEGIN, END = "<!-- benchmarks/multitask.py -->\n", "<!-- end -->\n"
NAMES = {"dense": "dense multitask", "moe": "mixtures of experts", "moe-lora": "mixtures of low-rank experts"}


def write_report(results: Path, comparison: Path, tasks: list[str], page: Path = PAGE) -> None:
    """Put the tables between the page's marks.

    Args:
        results: Folder with the results of `multitask.py`.
        comparison: Folder with the results of single tasks, see `benchmarks/method_comparison`.
        tasks: Names of the tasks, in the order of the columns.
        page: Page that is changed. Default docs/multitask.md.
    """
    rows = [row for row in [single_row(results, comparison, tasks), *rows_of(results / "test", tasks)] if row]
    head = ["", "learning rate", "seeds", *tasks, "mean", "trained, M"]
    text = table(head, rows)
    if tried := rows_of(results / "validation", tasks):
        text += f"\nOn validation images, after the same epochs on half of the training images:\n\n{table(head, tried)}"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + text + END + rest.partition(END)[2])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def rows_of(folder: Path, tasks: list[str]) -> list[list[str]]:
    """A row for each variant, keep rate and learning rate, means over the seeds."""
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*/seed-*.json")):
        run = json.loads(path.read_text())
        runs[list(NAMES).index(run["variant"]), run["keep_rate"], run["learning_rate"]].append(run)
    return [
        row(
            f"{list(NAMES.values())[variant]}, keep {keep_rate:g}",
            rate,
            [found["accuracy"] for found in group],
            tasks,
            group[0]["trained_parameters"],
        )
        for (variant, keep_rate, rate), group in sorted(runs.items())
    ]


def single_row(results: Path, comparison: Path, tasks: list[str]) -> list[str] | None:
    """Full fine-tunes of single tasks, for the seeds that all tasks have."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for task in tasks:
        folders = (comparison / task / "full_finetuning--all", results / "single" / task)
        paths = [path for folder in folders for path in folder.glob("seed-*.json")]
        runs[task] = {path.stem: json.loads(path.read_text()) for path in paths}
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    if not seeds:
        return None
    infos = [{task: runs[task][seed]["train_info"] for task in tasks} for seed in seeds]
    return row(
        f"{len(tasks)} full fine-tunes",
        runs[tasks[0]][seeds[0]]["run_info"]["train_config"]["learning_rate"],
        [{task: info[task]["metrics"][0]["accuracy"] for task in tasks} for info in infos],
        tasks,
        sum(infos[0][task]["num_trainable_params"] for task in tasks),
    )


def row(name: str, rate: float, accuracies: list[dict[str, float]], tasks: list[str], trained: int) -> list[str]:
    """Cells of a row: accuracies in percent, means over the seeds."""
    means = [100 * mean(found[task] for found in accuracies) for task in tasks]
    scores = [f"{score:.1f}" for score in (*means, mean(means))]
    return [name, f"{rate:g}", str(len(accuracies)), *scores, f"{trained / 1e6:.2f}"]
