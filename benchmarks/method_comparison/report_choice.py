"""The tables of docs/which_method.md: the main choices by what is short."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from report_memory import LIMITS, Peaks, images_within

if TYPE_CHECKING:
    from report import Row

LABELS = {
    "full_finetuning/all": "full fine-tuning",
    "linear_probe/head": "linear probe",
    "lora/all_linear": "PEFT's LoRA, every Linear",
    "lora/qv": "PEFT's LoRA, q and v",
    "lora/qv-checkpointing": "PEFT's LoRA, q and v, gradient checkpointing",
    "bsr/spread-exact": "`BSRConfig()`, the paper's plan",
    "bsr/from3-lora-merge": '`BSRConfig(preset="balanced")`',
    "bsr/qv-lora-max": '`BSRConfig(preset="lora")`',
    "bsr/from3-lora-keep.7": '`preset="balanced"`, `keep_rate=0.7`, `reduction="drop"`, `lean="exact"`',
    "bsr/spread-merge": '`BSRConfig(reduction="merge")`',
    "bsr/upper-exact": "`BSRConfig(trainable_blocks=[5, 8, 11], keep_rate=0.7)`",
    "bsr/late-exact": '`BSRConfig(trainable_blocks="last:3", reduction_blocks=[8])`',
    "bsr/late-cached": '`BSRConfig(trainable_blocks="last:3", reduction_blocks=[8])`, from a feature cache',
    "bsr/last8-lora": '`BSRConfig(trainable="lora", trainable_blocks="last:8", reduction_blocks=[8])`',
    "bsr/all-lora-max": '`BSRConfig(trainable="lora", trainable_blocks="every:1", keep_rate=1.0, lean="max")`',
    "alast/default": "`ALaSTConfig(token_multiple=1)`",
    "losa/all": "`LoSAConfig()`",
    "synqt/queries4": "`SynQTConfig(num_queries=4)`",
}
TITLES = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}
_PLACE = r"(?<=<!-- benchmarks/method_comparison/report\.py{} -->\n\n).*?(?=\n\n<!-- end -->)"


def write_table(page: Path, table: str, name: str = "") -> None:
    """Replace a table between the comments that name report.py and the table."""
    place = re.compile(_PLACE.format(f": {name}" if name else ""), re.DOTALL)
    page.write_text(place.sub(lambda _: table, page.read_text()))


def choice_tables(
    tasks: Mapping[str, list[Row]], peaks: Peaks, by_seconds: Mapping[float, Mapping[str, list[Row]]]
) -> dict[str, str]:
    """Name of a table -> its text: `accuracy`, `memory`, and with results `time`.

    Args:
        tasks: Dataset -> its rows.
        peaks: From memory.py.
        by_seconds: Seconds of training -> dataset -> its rows.
    """
    found = {"accuracy": _accuracy(tasks), "memory": _memory(tasks, peaks)}
    return found | ({"time": _time(by_seconds)} if by_seconds else {})


def _accuracy(tasks: Mapping[str, list[Row]]) -> str:
    lines = [f"| | {_titles(tasks)} | activations | step |", f"|---|{'---|' * (len(tasks) + 2)}"]
    for name, cells in _by_accuracy(tasks).items():
        cost = next(row.cost for rows in tasks.values() for row in rows if row.experiment.name == name)
        costs = ["", ""] if cost is None else [f"1/{1 / cost['saved_to_full']:.1f}", f"{cost['step_to_full']:.2f}"]
        lines.append(f"| {LABELS[name]} | {' | '.join([*cells, *costs])} |")
    return "\n".join(lines)


def _memory(tasks: Mapping[str, list[Row]], peaks: Peaks) -> str:
    limits = " | ".join(f"{limit} MiB" for limit in LIMITS)
    lines = [f"| images at once within | {limits} | {_titles(tasks)} |", f"|---|{'---|' * (len(tasks) + len(LIMITS))}"]
    for name, cells in _by_accuracy(tasks).items():
        if name in peaks:
            sizes = [str(images_within(peaks[name], limit) or "-") for limit in LIMITS]
            lines.append(f"| {LABELS[name]} | {' | '.join([*sizes, *cells])} |")
    return "\n".join(lines)


def _time(by_seconds: Mapping[float, Mapping[str, list[Row]]]) -> str:
    columns = {
        f"{TITLES.get(task, task)}, {seconds / 60:g} min": rows
        for seconds, tasks in sorted(by_seconds.items())
        for task, rows in tasks.items()
        if rows
    }
    lines = [f"| accuracy, % | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, cells in _by_accuracy(columns, with_range=True).items():
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_accuracy(tasks: Mapping[str, list[Row]], with_range: bool = False) -> dict[str, list[str]]:
    """Name -> accuracy in each column as text, by the mean over the first two; an empty cell without results."""
    rows = {task: {row.experiment.name: row for row in rows} for task, rows in tasks.items()}
    found = {name: [of_task.get(name) for of_task in rows.values()] for name in LABELS}
    found = {name: own for name, own in found.items() if any(own)}

    def accuracy(name: str) -> float:
        return mean(row.accuracy for row in found[name][:2] if row) if any(found[name][:2]) else 0.0

    order = sorted(found, key=accuracy, reverse=True)
    return {name: [_score(row, with_range) for row in found[name]] for name in order}


def _score(row: Row | None, with_range: bool) -> str:
    if row is None:
        return ""
    scores = [100 * value for value in row.accuracies.values()]
    text = f"{100 * row.accuracy:.1f}"
    if len(scores) < 3:
        return f"{text} ({'one seed' if len(scores) == 1 else 'two seeds'})"
    return f"{text} ({min(scores):.1f} to {max(scores):.1f})" if with_range else text


def _titles(tasks: Mapping[str, list[Row]]) -> str:
    return " | ".join(f"{TITLES.get(task, task)}, %" for task in tasks)


__all__ = ["LABELS", "TITLES", "choice_tables", "write_table"]
