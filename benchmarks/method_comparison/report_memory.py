"""The table and plot of what each method reaches within so much memory; see memory.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from report import Row

LIMITS = (64, 128, 256, 512)  # MiB
Peaks = dict[str, dict[str, int]]  # experiment -> images that run together -> bytes


def images_within(peaks: dict[str, int], limit: float) -> int:
    """Images that can run together within `limit` MiB; 0 = not even one."""
    return max((int(images) for images, peak in peaks.items() if peak <= limit * 2**20), default=0)


def memory_table(rows: list[Row], peaks: Peaks) -> str:
    """Table by accuracy: how many images run together within each limit. The best row of each limit is bold."""
    found = sorted((row for row in rows if row.experiment.name in peaks), key=lambda row: -row.accuracy)
    lines = [
        f"| experiment | accuracy, % | {' | '.join(f'{limit} MiB' for limit in LIMITS)} |",
        f"|---|---|{'---|' * len(LIMITS)}",
    ]
    has_best: set[int] = set()
    for row in found:
        cells = []
        for limit in LIMITS:
            images = images_within(peaks[row.experiment.name], limit)
            is_best = images > 0 and limit not in has_best
            has_best |= {limit} if is_best else set()
            cells.append(f"**{images}**" if is_best else str(images or "-"))
        lines.append(f"| {row.experiment.name} | {100 * row.accuracy:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_section(
    tasks: dict[str, list[Row]], peaks: Peaks, picture_of: Callable[[str, str], Path], colors: dict[str, str]
) -> list[str]:
    """The section of the page; draws its pictures."""
    parts = [(Path(__file__).parent / "memory.md").read_text().strip()]
    for task, rows in tasks.items():
        picture = picture_of(task, "-memory")
        draw_memory(rows, peaks, task, picture, colors)
        parts += [f"### {task}, by memory", memory_table(rows, peaks), f"![{task}, by memory](images/{picture.name})"]
    return parts


def draw_memory(rows: list[Row], peaks: Peaks, task: str, path: Path, colors: dict[str, str]) -> None:
    """Accuracy over the peak: each experiment is a line from one image at a time to the whole batch."""
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for row in rows:
        name = row.experiment.name
        if name in peaks:
            sizes = [peak / 2**20 for peak in peaks[name].values()]
            color = colors.get(name.split("/")[0], "tab:red")
            axis.plot([min(sizes), max(sizes)], [100 * row.accuracy] * 2, "|-", color=color, lw=1.2)
            place = (max(sizes), 100 * row.accuracy)
            axis.annotate(name, place, xytext=(4, -2), textcoords="offset points", fontsize=6)
    for limit in LIMITS:
        axis.axvline(limit, color="gray", lw=0.5, ls=":")
    axis.set_xscale("log")
    axis.set_xlabel("peak memory beside the weights, MiB: one image at a time (left) to the whole batch (right)")
    axis.set_ylabel(f"test accuracy on {task}, %")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


__all__ = ["LIMITS", "Peaks", "images_within", "memory_section", "memory_table"]
