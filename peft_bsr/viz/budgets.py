"""Pictures of ALaST's budgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from peft_bsr.errors import AdapterError
from peft_bsr.viz.files import save_figure

if TYPE_CHECKING:
    from peft_bsr.training import BudgetRecord


def draw_budgets(history: Sequence[BudgetRecord], path: str | Path) -> Path:
    """Heat-maps of the budgets and of the blocks that trained, over the steps.

    Args:
        history: `BudgetRecord`s, from `ALaSTCallback.history`.
        path: File to write; its extension sets the format (`.png`, `.svg`, `.pdf`).

    Returns:
        `path`.

    Raises:
        AdapterError: If nothing was recorded.
    """
    if not history:
        raise AdapterError("`history` is empty: no step was recorded. Pass the callback to Trainer before training.")
    depth = len(history[0].budgets)
    budgets = np.array([record.budgets for record in history]).T
    trained = np.array([[index in record.selected for record in history] for index in range(depth)])
    figure = Figure(figsize=(10, 1.5 + 0.4 * depth), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    steps = (history[0].step - 0.5, history[-1].step + 0.5)
    settings = {
        "aspect": "auto",
        "interpolation": "nearest",
        "origin": "lower",
        "extent": (*steps, -0.5, depth - 0.5),
    }
    shown = axes[0].imshow(budgets, cmap="viridis", **settings)
    figure.colorbar(shown, ax=axes[0], label="budget")
    axes[1].imshow(trained, cmap="Greys", vmin=0, vmax=1.4, **settings)
    for axis, title in zip(axes, ("share of tokens kept after each block", "blocks that trained (dark)"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("block")
        axis.set_yticks(range(depth))
    axes[1].set_xlabel("optimizer step")
    return save_figure(figure, path, dpi=130)
