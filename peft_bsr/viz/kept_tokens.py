"""Which patches each reduction keeps, drawn over the images."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from peft_bsr.core import Route
from peft_bsr.engine import record_routes
from peft_bsr.errors import AdapterError

_VEIL = np.array([0.30, 0.42, 0.62])  # a blue that neither black nor white backgrounds have
_OPACITY = 0.8  # how much of a dropped patch the veil hides


def draw_kept_tokens(
    model: nn.Module, pixel_values: Tensor, images: np.ndarray, path: str | Path, titles: list[str] | None = None
) -> Path:
    """Run the model and draw, one row an image, the image and what is left of it behind each reduction.

    Dropped patches lie under a blue veil. Images are drawn as given, so `images` and `pixel_values` must show the same.

    Args:
        model: A model with one of our adapters active, reducing tokens.
        pixel_values: [B, C, H, W], as the model takes them.
        images: [B, H, W, 3] or [B, H, W], values in 0 to 1.
        path: File to write; its ending picks the format (`.png`, `.svg`, ...).
        titles: One text an image.

    Returns:
        `path`.

    Raises:
        AdapterError: If the model has no adapter of ours, or none that reduces tokens.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), record_routes(model) as routes:
            model(pixel_values=pixel_values)
    finally:
        model.train(training)
    if not routes:
        raise AdapterError("the model dropped no tokens: its adapter has `keep_rate=1.0` or is disabled.")
    rows = len(images)
    # a Figure of its own, not pyplot: no global state, no window
    figure = Figure(figsize=(1.6 * (len(routes) + 1), 1.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(routes) + 1, squeeze=False)
    titles_above = ["input", *(f"block {block}: {_share(route)} kept" for block, route in routes)]
    for row, image in enumerate(images):
        colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
        axes[row, 0].imshow(colour)
        axes[row, 0].set_ylabel(titles[row] if titles else "")
        for axis, (_, route) in zip(axes[row, 1:], routes, strict=True):
            axis.imshow(_veil(colour, route.alive()[row].cpu().numpy()))
    for axis, text in zip(axes[0], titles_above, strict=True):
        axis.set_title(text, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with matplotlib.rc_context({"svg.hashsalt": "peft_bsr"}):
        figure.savefig(path, dpi=150)
    return Path(path)


def _share(route: Route) -> str:
    return f"{route.alive().float().mean():.0%}"


def _veil(image: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """[H, W, 3] with the patches that are not in `alive` [patches] veiled."""
    height, width = image.shape[:2]
    rows = round((alive.size * height / width) ** 0.5)
    grid = alive.reshape(rows, -1)
    # nearest patch of every pixel: the image need not be a multiple of the patch
    row_of, column_of = (np.arange(n) * k // n for n, k in zip((height, width), grid.shape, strict=True))
    is_alive = grid[row_of][:, column_of][..., None]
    return np.where(is_alive, image, (1 - _OPACITY) * image + _OPACITY * _VEIL)
