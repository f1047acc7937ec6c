"""Pictures of what the blocks contribute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from peft_bsr.cost import Contributions
from peft_bsr.viz.files import save_figure

_TITLES = {"full": "whole blocks", "lora": "low-rank updates"}
_LABELS = {
    "sensitivity": "sum of squared gradients",
    "trial": "decrease of the loss relative to the head alone",
}


def draw_contributions(found: Contributions, path: str | Path) -> Path:
    """Bars of what each block gains, by attention, MLP and the rest: whole on the left, low-rank on the right.

    Args:
        found: From `peft_bsr.cost.contributions`.
        path: File to write; its ending says the format (`.png`, `.svg`, `.pdf`).

    Returns:
        `path`.
    """
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    places = np.arange(found.depth)
    for axes, (form, title) in zip(figure.subplots(1, 2), _TITLES.items(), strict=True):
        blocks = found.of_parts(form)
        names = [name for name in ("attention", "mlp", "other") if any(name in block for block in blocks)]
        below = np.zeros(found.depth)
        for name in names:
            heights = np.array([block.get(name, 0.0) for block in blocks])
            axes.bar(places, heights, bottom=below, label=name)
            below += heights
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("block")
        axes.set_ylabel(_LABELS[found.kind])
        axes.set_xticks(places)
        if len(names) > 1:
            axes.legend()
    return save_figure(figure, path, dpi=130)
