"""Which patches each reduction keeps, drawn over the images."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from peft_bsr.engine import record_routes

_FADE = 0.2  # brightness of a dropped patch


def draw_kept_tokens(
    model: nn.Module, pixel_values: Tensor, images: np.ndarray, path: str | Path, titles: list[str] | None = None
) -> Path:
    """Run the model and draw, one row an image, the image and what is left of it behind each reduction.

    Dropped patches fade. Images are drawn as given, so `images` and `pixel_values` must show the same.

    Args:
        model: A model with one of our adapters active, reducing tokens.
        pixel_values: [B, C, H, W], as the model takes them.
        images: [B, H, W, 3] or [B, H, W], values in 0 to 1.
        path: File to write; its ending picks the format (`.png`, `.svg`, ...).
        titles: One text an image.

    Returns:
        `path`.

    Raises:
        ValueError: If the model has no adapter of ours, or none that reduces tokens.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), record_routes(model) as routes:
            model(pixel_values=pixel_values)
    finally:
        model.train(training)
    if not routes:
        raise ValueError("the model dropped no tokens: its adapter has `keep_rate=1.0` or is disabled.")
    rows = len(images)
    # a Figure of its own, not pyplot: no global state, no window
    figure = Figure(figsize=(1.6 * (len(routes) + 1), 1.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(routes) + 1, squeeze=False)
    for row, image in enumerate(images):
        axes[row, 0].imshow(image, cmap="gray", vmin=0, vmax=1)
        axes[row, 0].set_ylabel(titles[row] if titles else "")
        for column, (_, route) in enumerate(routes, start=1):
            axes[row, column].imshow(_fade(image, route.alive()[row].cpu().numpy()), cmap="gray", vmin=0, vmax=1)
    for column, text in enumerate(["input", *(f"block {block}: {_share(route)}" for block, route in routes)]):
        axes[0, column].set_title(text, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with matplotlib.rc_context({"svg.hashsalt": "peft_bsr"}):
        figure.savefig(path, dpi=150)
    return Path(path)


def _share(route: object) -> str:
    alive = route.alive()  # type: ignore[attr-defined]
    return f"{alive.float().mean():.0%} of patches"


def _fade(image: np.ndarray, alive: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    rows = round((alive.size * height / width) ** 0.5)
    grid = alive.reshape(rows, -1)
    mask = np.kron(grid, np.ones((height // grid.shape[0], width // grid.shape[1])))
    mask = np.pad(mask, ((0, height - mask.shape[0]), (0, width - mask.shape[1])), mode="edge")
    weight = _FADE + (1 - _FADE) * mask
    return image * (weight[..., None] if image.ndim == 3 else weight)
