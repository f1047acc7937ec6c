"""Write the page of tables and plots.

    python benchmarks/method_comparison/report.py [--protocol cpu] [--output docs/benchmarks.md]

It is made of the results that are there; rows without any are left out.
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
from launch import HERE, add_results, results_of
from run import result_path
from sweep import load_recipes

REFERENCE = "full_finetuning/all"
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
}


@dataclass(frozen=True)
class Row:
    """All runs of an experiment on a task, and its costs.

    Attributes:
        experiment: What ran.
        accuracies: On the test images, one a seed.
        runs: The results themselves.
        cost: From `costs.json`.
    """

    experiment: Experiment
    accuracies: list[float]
    runs: list[dict[str, Any]]
    cost: dict[str, Any] | None

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.accuracies)


def main() -> None:
    """Write the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="cpu", help="default cpu")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "docs" / "benchmarks.md", help="the page")
    add_results(parser)
    args = parser.parse_args()
    protocol = Protocol.load(args.protocol)
    results = results_of(args)
    costs_path = results / "costs.json"
    costs = json.loads(costs_path.read_text()) if costs_path.exists() else {}
    tasks = {task: rows for task in protocol.tasks if (rows := load_rows(results, task, costs))}
    if not tasks:
        raise SystemExit(f"{results} has no results; run run.py first.")
    recipes = load_recipes(args)
    pictures = args.output.parent / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = [(HERE / "page.md").read_text().strip(), conditions(protocol, tasks)]
    for task, rows in tasks.items():
        picture = pictures / f"benchmark-{protocol.name}-{task.replace('/', '--')}.png"
        draw(rows, task, picture)
        parts += [f"## {task}", accuracy_table(rows), f"![{task}]({picture.relative_to(args.output.parent)})"]
    parts += ["## Costs", cost_table(costs, tasks), "## Learning rates", recipe_table(recipes)]
    if tried := [json.loads(path.read_text()) for path in sorted((results / "tried").glob("*.json"))]:
        parts += ["## What else was tried", tried_table(tried, recipes, costs)]
    args.output.write_text("\n\n".join(parts) + "\n")
    print(f"{args.output}: {sum(len(row.runs) for rows in tasks.values() for row in rows)} runs")


def load_rows(results: Path, task: str, costs: dict[str, Any]) -> list[Row]:
    """Of every experiment that ran on the task."""
    rows = []
    for experiment in Experiment.all():
        folder = result_path(results, task, experiment.name, 0).parent
        runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
        if runs:
            accuracies = [run["train_info"]["metrics"][0]["accuracy"] for run in runs]
            rows.append(Row(experiment, accuracies, runs, costs.get(experiment.name)))
    return rows


def accuracy_table(rows: list[Row]) -> str:
    """Accuracy beside what it costs."""
    full = next((row for row in rows if row.experiment.name == REFERENCE), None)
    lines = [
        "| experiment | accuracy, % | seeds | to full | saved, MiB | of full | images/s to full "
        "| peak above start, MiB | file, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = (f"{100 * value:.1f}" for value in (min(row.accuracies), max(row.accuracies)))
        spread = "" if len(row.runs) == 1 else f" ({low} to {high})"
        to_full = "" if full is None else f"{100 * (row.accuracy - full.accuracy):+.1f}"
        infos = [run["train_info"] for run in row.runs]
        peak = statistics.median(info["memory_peak_bytes"] - info["memory_start_bytes"] for info in infos) / 2**20
        cost = row.cost
        costs = ["", "", ""]
        if cost is not None:
            share, speed = 1 / cost["saved_to_full"], 1 / cost["step_to_full"]
            costs = [mib(cost["saved_bytes_per_image"]), f"1/{share:.1f}", f"{speed:.2f}"]

        cells = [f"{100 * row.accuracy:.1f}{spread}", str(len(row.runs)), to_full, *costs, f"{peak:.0f}"]
        lines.append(f"| {row.experiment.name} | {' | '.join(cells)} | {infos[0]['file_size'] / 2**20:.2f} |")
    return "\n".join(lines)


def cost_table(costs: dict[str, Any], tasks: dict[str, list[Row]]) -> str:
    """What a step costs, whatever the images."""
    every = [row for rows in tasks.values() for row in rows]
    trained = {row.experiment.name: row.runs[0]["train_info"]["num_trainable_params"] for row in every}
    lines = [
        "| experiment | trained, M | saved, MiB | forward, GMACs | training, GFLOPs | step to full |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in sorted(costs.items()):
        lines.append(
            f"| {name} | {trained.get(name, 0) / 1e6:.3f} | {mib(cost['saved_bytes_per_image'])} "
            f"| {cost['forward_macs_per_image'] / 1e9:.2f} | {cost['training_flops_per_image'] / 1e9:.2f} "
            f"| {cost['step_to_full']:.2f} |"
        )
    return "\n".join(lines)


def recipe_table(recipes: dict[str, Any]) -> str:
    """What was tried, and what was taken."""
    lines = ["| recipe | tried on | rate | validation accuracy of every rate, % |", "|---|---|---|---|"]
    for name, recipe in sorted(recipes.items()):
        tried = ", ".join(f"{rate}: {100 * score:.1f}" for rate, score in recipe["tried"].items())
        lines.append(f"| {name} | {recipe['experiment']} | {recipe['learning_rate']:g} | {tried} |")
    return "\n".join(lines)


def tried_table(tried: list[dict[str, Any]], recipes: dict[str, Any], costs: dict[str, Any]) -> str:
    """Variants of a recipe, on the images of the sweep."""
    size = tried[0]["train_info"]["metrics"][0]
    lines = [
        f"On the {size['split']} split, trained on the images of the sweep, one seed, at the recipe's rate:\n",
        "| experiment | accuracy, % | trained blocks, reduction, other settings | saved of full | step to full |",
        "|---|---|---|---|---|",
    ]
    leader = recipes[Experiment.load(tried[0]["run_info"]["experiment_name"]).params["recipe"]]
    rate = f"{leader['learning_rate']:g}"
    lines.append(f"| {leader['experiment']} | {100 * leader['tried'][rate]:.1f} | as in the sweep | | |")
    for run in sorted(tried, key=lambda run: -run["train_info"]["metrics"][0]["accuracy"]):
        name, cost = run["run_info"]["experiment_name"], costs.get(run["run_info"]["experiment_name"])
        config = json.loads((EXPERIMENTS / name / "adapter_config.json").read_text())
        settings = ", ".join(f"{key} {value}" for key, value in config.items() if key != "peft_type")
        shares = ["", ""] if cost is None else [f"1/{1 / cost['saved_to_full']:.1f}", f"{cost['step_to_full']:.2f}"]
        accuracy = 100 * run["train_info"]["metrics"][0]["accuracy"]
        lines.append(f"| {name} | {accuracy:.1f} | {settings} | {' | '.join(shares)} |")
    return "\n".join(lines)


def conditions(protocol: Protocol, tasks: dict[str, list[Row]]) -> str:
    """Machine, versions and protocol, from the results."""
    runs = [run for rows in tasks.values() for row in rows for run in row.runs]
    infos = [run["meta_info"] for run in runs]
    models = {f"{info['model_info']['model']} ({info['model_info']['dtype']})" for info in infos}
    where, versions = set(), set()
    for info in infos:
        system, packages = info["system_info"], info["package_info"]
        where.add(f"{system['device']} ({system['processor']}, {system['threads']} threads a run)")
        numbers = [f"{name.removesuffix('-version')} {number}" for name, number in packages.items()]
        versions.add(", ".join([f"torch {info['pytorch_info']}", *numbers]))
    dates = sorted(run["run_info"]["created_at"][:10] for run in runs)
    return (
        f"Protocol `{protocol.name}`: {protocol.train_images} training, {protocol.validation_images} validation and "
        f"{protocol.test_images} test images, {protocol.epochs} epochs, batch {protocol.batch_size}; "
        f"{len(runs)} runs from {dates[0]} to {dates[-1]}.\n\n"
        f"Model: {'; '.join(sorted(models))}. Machine: {'; '.join(sorted(where))}. "
        f"Versions: {'; '.join(sorted(versions))}."
    )


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
            y = [100 * value for value in row.accuracies]
            axis.errorbar(
                x, 100 * row.accuracy, yerr=[[100 * row.accuracy - min(y)], [max(y) - 100 * row.accuracy]],
                fmt="o", color=COLORS.get(method, "tab:red"), capsize=2,
            )  # fmt: skip
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
