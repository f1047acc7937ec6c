"""Attention of the class token in every block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn

from peft_bsr.backbones import ModelSpec, in_mode, probe_model
from peft_bsr.engine import BlockScores, record_scores
from peft_bsr.errors import InputError, UnsupportedModelError
from peft_bsr.tuners.base.layer import find_backbone, find_controllers, runs_on_images
from peft_bsr.viz.files import save_figure

_COLUMNS = 7  # pictures side by side at most; a ViT-B's input and 12 blocks fill two lines


def draw_attention(model: nn.Module, pixel_values: Tensor, image: np.ndarray, path: str | Path) -> Path:
    """Run the model on one image and draw the attention of its class token in each block, mean over heads.

    It is the softmax that the block computed, on its remaining tokens; dropped patches are grey. Without a class token
    it is the attention of the mean query. Each block has its own colour scale, from 0 to the number in its title; 1 is
    the sum over all tokens, including special and fused ones.

    Args:
        model: A supported vision transformer, with or without one of our adapters.
        pixel_values: [1, C, H, W], the model's input.
        image: [H, W, 3], [H, W, 1] or [H, W], values in 0 to 1.
        path: File to write; its extension sets the format (`.png`, `.svg`, `.pdf`).

    Returns:
        `path`.

    Raises:
        InputError: If several images are given.
        UnsupportedModelError: If the attention of this model cannot be observed, or its tokens are not a patch grid.
    """
    if len(pixel_values) != 1:
        raise InputError(
            f"`pixel_values` holds {len(pixel_values)} images; one can be drawn. Pass `pixel_values[i : i + 1]`."
        )
    spec, found = _scores(model, pixel_values)
    if not found:
        raise UnsupportedModelError(f"the attention of {type(model).__name__} does not expose its weights or queries.")
    lines = -(-(len(found) + 1) // _COLUMNS)
    columns = -(-(len(found) + 1) // lines)
    figure = Figure(figsize=(1.6 * columns, 1.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    axes[0].imshow(image, cmap="gray", vmin=0, vmax=1)
    axes[0].set_title("input", fontsize=8)
    palette = colormaps["magma"].with_extremes(bad="0.75")
    grid = spec.grid_at(*pixel_values.shape[-2:])
    for axis, block in zip(axes[1:], found, strict=False):
        scores = _on_grid(block, grid)
        axis.imshow(scores, cmap=palette, vmin=0, vmax=np.nanmax(scores), interpolation="nearest")
        axis.set_title(f"block {block.block}: {np.nanmax(scores):.1%}", fontsize=8)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(found) + 1 :]:
        axis.set_visible(False)
    return save_figure(figure, path, dpi=150)


def _scores(model: nn.Module, pixel_values: Tensor) -> tuple[ModelSpec, list[BlockScores]]:
    base = find_backbone(model)
    controllers = find_controllers(model)
    spec = controllers[0].spec if controllers else probe_model(base)
    with in_mode(False, model), torch.no_grad(), record_scores(base, spec) as found:
        runs_on_images(model)(pixel_values=pixel_values)
    return spec, found


def _on_grid(block: BlockScores, grid: tuple[int, ...]) -> np.ndarray:
    """[rows, columns] of a grid, NaN where a patch was dropped."""
    route, scores = block.route, block.scores[0].float().cpu()
    alive = scores[route.num_prefix : len(scores) - route.num_suffix]
    patches = torch.full((route.num_patches + route.num_reductions,), torch.nan)
    patches[route.origins_like(block.scores[..., None])[0].cpu()] = alive
    found: np.ndarray = patches[: route.num_patches].reshape(grid).numpy()
    return found


__all__ = ["draw_attention"]
