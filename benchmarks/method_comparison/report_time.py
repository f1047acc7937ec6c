"""The table and plot of what each method reaches within so many seconds; see `run.py --seconds`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from report import Row

BySeconds = dict[float, "dict[str, Row]"]  # budget -> experiment -> its runs


def budgets_in(results: Path) -> list[tuple[float, Path]]:
    """Each budget in seconds, and the folder of its results."""
    return sorted((float(path.name.removesuffix("-seconds")), path) for path in results.glob("*-seconds"))


def time_section(
    tasks: list[str],
    rows: dict[float, dict[str, list[Row]]],
    picture_of: Callable[[str, str], Path],
    colors: dict[str, str],
) -> list[str]:
    """The section of the page; draws its pictures."""
    parts = [(Path(__file__).parent / "time.md").read_text().strip()]
    for task in tasks:
        of_task = {s: {row.experiment.name: row for row in found[task]} for s, found in rows.items() if found[task]}
        if of_task:
            picture = picture_of(task, "-time")
            draw_time(of_task, task, picture, colors)
            parts += [f"### {task}, by time", time_table(of_task), f"![{task}, by time](images/{picture.name})"]
    return parts


def time_table(rows: BySeconds) -> str:
    """Accuracy and epochs within each budget, by accuracy within the longest. The best of each budget is bold."""
    longest = rows[max(rows)]
    names = sorted({name for found in rows.values() for name in found}, key=lambda name: _order(longest.get(name)))
    best = {seconds: max(100 * row.accuracy for row in found.values()) for seconds, found in rows.items()}
    lines = [
        f"| experiment | {' | '.join(f'{seconds:g} s | epochs' for seconds in rows)} |",
        f"|---|{'---|---|' * len(rows)}",
    ]
    for name in names:
        cells = []
        for seconds, found in rows.items():
            row = found.get(name)
            if row is None:
                cells += ["", ""]
                continue
            scores = [100 * value for value in row.accuracies.values()]
            spread = "" if len(scores) == 1 else f" ({min(scores):.1f} to {max(scores):.1f})"
            accuracy = f"{100 * row.accuracy:.1f}"
            accuracy = f"**{accuracy}**" if 100 * row.accuracy == best[seconds] else accuracy
            epochs = sum(run["run_info"]["train_config"]["epochs"] for run in row.runs) / len(row.runs)
            cells += [accuracy + spread, f"{epochs:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_time(rows: BySeconds, task: str, path: Path, colors: dict[str, str]) -> None:
    """Accuracy over the seconds of training, a line for each experiment."""
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    for name in sorted({name for found in rows.values() for name in found}):
        points = [(seconds, 100 * found[name].accuracy) for seconds, found in rows.items() if name in found]
        axis.plot(*zip(*points, strict=True), "o-", color=colors.get(name.split("/")[0], "tab:red"), lw=1, ms=3)
        axis.annotate(name, points[-1], xytext=(4, -2), textcoords="offset points", fontsize=6)
    axis.set_xscale("log")
    axis.set_xticks(list(rows), [f"{seconds:g}" for seconds in rows])
    axis.set_xlabel("seconds of training, with attaching and caching")
    axis.set_ylabel(f"test accuracy on {task}, %")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _order(row: Row | None) -> float:
    return 0.0 if row is None else -row.accuracy


__all__ = ["budgets_in", "time_section", "time_table"]
