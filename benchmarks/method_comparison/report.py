"""Write the page of tables and plots, and the short tables of README.md and of which_method.md.

    python benchmarks/method_comparison/report.py [--protocol cpu] [--output docs/benchmarks.md]

It uses the results that exist; rows without results are left out. The short tables go between the comments that name
this script.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from data import Protocol
from experiment import EXPERIMENTS, Experiment
from launch import HERE, add_results, results_of, stored
from report_choice import LABELS, TITLES, choice_tables, write_table
from report_memory import memory_section
from report_time import budgets_in, time_section
from run import result_path
from sweep import load_recipes

REFERENCE = "full_finetuning/all"
FRONT = (
    "full_finetuning/all",
    "linear_probe/head",
    "lora/all_linear",
    "lora/qv",
    "lora/qv-checkpointing",
    "bsr/spread-exact",
    "bsr/upper-exact",
    "bsr/from3-lora-merge",
    "bsr/qv-lora-max",
)
FRONT_PROTOCOL = "cpu"  # what README.md says below its table
COLORS = {
    "full_finetuning": "black",
    "linear_probe": "tab:gray",
    "last_blocks": "tab:brown",
    "bitfit": "tab:olive",
    "ln_tuning": "tab:cyan",
    "lora": "tab:orange",
    "bsr": "tab:blue",
    "alast": "tab:green",
    "synqt": "tab:purple",
    "losa": "tab:pink",
}


@dataclass(frozen=True)
class Row:
    """All runs of an experiment on a task, and its costs.

    Attributes:
        experiment: The experiment.
        accuracies: Seed -> accuracy on the test images.
        runs: Results of the runs.
        cost: Entry of `costs.json`.
    """

    experiment: Experiment
    accuracies: dict[int, float]
    runs: list[dict[str, Any]]
    cost: dict[str, Any] | None

    @property
    def accuracy(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.mean(self.accuracies.values())

    def points_over(self, other: Row) -> float:
        """Mean difference of accuracy in points, over the seeds that both have."""
        shared = self.accuracies.keys() & other.accuracies.keys()
        return 100 * statistics.mean(self.accuracies[seed] - other.accuracies[seed] for seed in shared)


def main() -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="cpu", help="default cpu")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "docs" / "benchmarks.md", help="the page")
    add_results(parser)
    args = parser.parse_args()
    protocol = Protocol.load(args.protocol)
    results = results_of(args)
    costs = stored(results / "costs.json")
    tasks = {task: rows for task in protocol.reported_tasks if (rows := load_rows(results, task, costs))}
    if not tasks:
        raise SystemExit(f"{results} has no results; run run.py first.")
    recipes = load_recipes(args)
    pictures = args.output.parent / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [(HERE / "page.md").read_text().strip(), conditions(protocol, tasks)]

    def picture_of(task: str, kind: str = "") -> Path:
        return pictures / f"benchmark-{protocol.name}-{task.replace('/', '--')}{kind}.png"

    for task, rows in tasks.items():
        draw(rows, task, picture_of(task))
        parts += [f"## {task}", accuracy_table(rows), f"![{task}](images/{picture_of(task).name})"]
    if peaks := stored(results / "memory.json"):
        parts += memory_section(tasks, peaks, picture_of, COLORS)
    by_seconds = {s: {task: load_rows(folder, task, costs) for task in tasks} for s, folder in budgets_in(results)}
    parts += time_section(list(tasks), by_seconds, picture_of, COLORS) if by_seconds else []
    parts += ["## Costs", cost_table(costs, tasks), "## Learning rates", recipe_table(recipes)]
    if tried := [json.loads(path.read_text()) for path in sorted((results / "tried").glob("*.json"))]:
        parts += ["## What else was tried", tried_table(tried, recipes, costs)]
    args.output.write_text("\n\n".join(parts) + "\n")
    if protocol.name == FRONT_PROTOCOL:
        readme = args.output.parents[1] / "README.md"
        if readme.exists():
            write_table(readme, front_table(tasks))
        page = args.output.parent / "which_method.md"
        for name, table in choice_tables(tasks, peaks, by_seconds).items() if page.exists() else ():
            write_table(page, table, name)
    print(f"{args.output}: {sum(len(row.runs) for rows in tasks.values() for row in rows)} runs")


def load_rows(results: Path, task: str, costs: dict[str, Any]) -> list[Row]:
    """Rows of all experiments that ran on the task."""
    rows = []
    for experiment in Experiment.all():
        folder = result_path(results, task, experiment.name, 0).parent
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
        if runs:
            seeds = [run["run_info"]["train_config"]["seed"] for run in runs]
            scores = [run["train_info"]["metrics"][0]["accuracy"] for run in runs]
            accuracies = dict(zip(seeds, scores, strict=True))
            rows.append(Row(experiment, accuracies, runs, costs.get(experiment.name)))
    return rows


def accuracy_table(rows: list[Row]) -> str:
    """Table of accuracies and costs."""
    full = next((row for row in rows if row.experiment.name == REFERENCE), None)
    lines = [
        "| experiment | accuracy, % | seeds | to full | saved, MiB | of full | images/s to full "
        "| peak, MiB | with gaps, MiB | file, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = (f"{100 * value:.1f}" for value in (min(row.accuracies.values()), max(row.accuracies.values())))
        spread = "" if len(row.runs) == 1 else f" ({low} to {high})"
        to_full = "" if full is None else f"{row.points_over(full):+.1f}"
        infos = [run["train_info"] for run in row.runs]
        gaps = statistics.median(info["memory_peak_bytes"] - info["memory_start_bytes"] for info in infos) / 2**20
        cost = row.cost
        costs = ["", "", "", ""]
        if cost is not None:
            share, speed = 1 / cost["saved_to_full"], 1 / cost["step_to_full"]
            peak = f"{cost['peak_bytes'] / 2**20:.0f}"
            costs = [mib(cost["saved_bytes_per_image"]), f"1/{share:.1f}", f"{speed:.2f}", peak]
        cells = [f"{100 * row.accuracy:.1f}{spread}", str(len(row.runs)), to_full, *costs, f"{gaps:.0f}"]
        lines.append(f"| {row.experiment.name} | {' | '.join(cells)} | {infos[0]['file_size'] / 2**20:.2f} |")
    return "\n".join(lines)


def front_table(tasks: dict[str, list[Row]]) -> str:
    """Table of the main choices: peak, speed and accuracy on each task that has all of them."""
    by_task = {task: {row.experiment.name: row for row in rows} for task, rows in tasks.items()}
    by_task = {task: rows for task, rows in by_task.items() if rows.keys() >= set(FRONT)}
    if not by_task:
        raise SystemExit(f"No task has results of all of {list(FRONT)}: README.md is unchanged.")
    header = ["", "peak memory, MiB", "speed, relative to full", *(f"{TITLES.get(task, task)}, %" for task in by_task)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for name in FRONT:
        found = [rows[name] for rows in by_task.values()]
        cost = found[0].cost
        assert cost is not None, f"{name} has no costs; run costs.py first."
        cells = [f"{cost['peak_bytes'] / 2**20:.0f}", f"{1 / cost['step_to_full']:.1f}"]
        cells += [f"{100 * row.accuracy:.1f}{' (one seed)' if len(row.runs) == 1 else ''}" for row in found]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost_table(costs: dict[str, Any], tasks: dict[str, list[Row]]) -> str:
    """Table of the costs of a step, which do not depend on the images."""
    every = [row for rows in tasks.values() for row in rows]
    trained = {row.experiment.name: f"{row.runs[0]['train_info']['num_trainable_params'] / 1e6:.3f}" for row in every}
    lines = [
        "| experiment | trained, M | saved, MiB | forward, GMACs | training, GFLOPs | step to full |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in sorted(costs.items()):
        lines.append(
            f"| {name} | {trained.get(name, '')} | {mib(cost['saved_bytes_per_image'])} "
            f"| {cost['forward_macs_per_image'] / 1e9:.2f} | {cost['training_flops_per_image'] / 1e9:.2f} "
            f"| {cost['step_to_full']:.2f} |"
        )
    return "\n".join(lines)


def recipe_table(recipes: dict[str, Any]) -> str:
    """Table of the learning rates that were tried and chosen."""
    lines = ["| recipe | tried on | rate | validation accuracy of every rate, % |", "|---|---|---|---|"]
    for name, recipe in sorted(recipes.items()):
        tried = ", ".join(f"{rate}: {100 * score:.1f}" for rate, score in recipe["tried"].items())
        lines.append(f"| {name} | {recipe['experiment']} | {recipe['learning_rate']:g} | {tried} |")
    return "\n".join(lines)


def tried_table(tried: list[dict[str, Any]], recipes: dict[str, Any], costs: dict[str, Any]) -> str:
    """Table of variants of the recipes, on the images of the sweep."""
    size = tried[0]["train_info"]["metrics"][0]
    lines = [
        f"On the {size['split']} split, trained on the images of the sweep, one seed, at the recipe's rate:\n",
        "| experiment | accuracy, % | what it changes | saved of full | step to full |",
        "|---|---|---|---|---|",
    ]
    groups: dict[str, list[tuple[float, str]]] = {}
    for run in tried:
        name = run["run_info"]["experiment_name"]
        accuracy = run["train_info"]["metrics"][0]["accuracy"]
        groups.setdefault(Experiment.load(name).params["recipe"], []).append((accuracy, name))
    for recipe, found in sorted(groups.items()):
        leader = recipes[recipe]
        own = (leader["tried"][f"{leader['learning_rate']:g}"], leader["experiment"])
        for accuracy, name in sorted([own, *found], reverse=True):
            config = json.loads((EXPERIMENTS / name / "adapter_config.json").read_text())
            config |= {"control": Experiment.load(name).params["control"]}
            changed = ", ".join(
                f"{key} {value}" for key, value in config.items() if key != "peft_type" and value is not None
            )
            what = f"**recipe {recipe}**" if name == leader["experiment"] else changed
            cost = costs.get(name)
            shares = ["", ""] if cost is None else [f"1/{1 / cost['saved_to_full']:.1f}", f"{cost['step_to_full']:.2f}"]
            lines.append(f"| {name} | {100 * accuracy:.1f} | {what} | {' | '.join(shares)} |")
    return "\n".join(lines)


def conditions(protocol: Protocol, tasks: dict[str, list[Row]]) -> str:
    """Machine, versions and protocol, from the results."""
    runs = [run for rows in tasks.values() for row in rows for run in row.runs]
    infos = [run["meta_info"] for run in runs]
    models = {f"{info['model_info']['model']} ({info['model_info']['dtype']})" for info in infos}
    trained_on = {_machine(info) for info in infos}
    measured_on = {_machine(row.cost) for rows in tasks.values() for row in rows if row.cost is not None}
    versions = set()
    for info in infos:
        numbers = [f"{name.removesuffix('-version')} {number}" for name, number in info["package_info"].items()]
        versions.add(", ".join([f"torch {info['pytorch_info']}", *numbers]))
    dates = sorted(run["run_info"]["created_at"][:10] for run in runs)
    sizes = {task: rows[0].runs[0]["run_info"]["train_config"]["train_images"] for task, rows in tasks.items()}
    others = [f"{task}: {size}" for task, size in sizes.items() if size != protocol.train_images]
    fewer = f" ({', '.join(others)})" if others else ""
    return (
        f"Protocol `{protocol.name}`: {protocol.train_images}{fewer} training, {protocol.validation_images} validation "
        f"and {protocol.test_images} test images, {protocol.epochs} epochs, batch {protocol.batch_size}; "
        f"{len(runs)} runs from {dates[0]} to {dates[-1]}.\n\n"
        f"Model: {'; '.join(sorted(models))}. Trained on: {'; '.join(sorted(trained_on))}. Costs measured on: "
        f"{'; '.join(sorted(measured_on))}. Versions: {'; '.join(sorted(versions))}."
    )


def _machine(info: dict[str, Any]) -> str:
    system = info["system_info"]
    return f"{system['device']} ({system['processor']}, {system['threads']} thread{'s' * (system['threads'] > 1)})"


def draw(rows: list[Row], task: str, path: Path) -> None:
    """Accuracy against saved activations and against step time."""
    measured = [row for row in rows if row.cost is not None]
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axis, key, label in zip(
        axes,
        ("saved_bytes_per_image", "step_to_full"),
        ("saved activations per image, MiB", "step time, full fine-tuning = 1"),
        strict=True,
    ):
        for row in measured:
            method = row.experiment.name.split("/")[0]
            x = row.cost[key] / (2**20 if key.startswith("saved") else 1)
            y, mean = [100 * value for value in row.accuracies.values()], 100 * row.accuracy
            below, above = max(0.0, mean - min(y)), max(0.0, max(y) - mean)  # rows of one run differ by rounding only
            color = COLORS.get(method, "tab:red")
            axis.errorbar(x, mean, yerr=[[below], [above]], fmt="o", color=color, capsize=2)
            name, at = row.experiment.name.replace("/", ": "), (x, 100 * row.accuracy)
            axis.annotate(name, at, xytext=(5, 3), textcoords="offset points", fontsize=6)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].set_ylabel(f"test accuracy on {task}, %")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def mib(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:.2f}"


if __name__ == "__main__":
    main()
