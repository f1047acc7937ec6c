"""Which patches each reduction keeps or merges, drawn over the images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from peft_bsr.backbones import in_mode
from peft_bsr.core import Route
from peft_bsr.engine import BlockScores, record_routes, record_scores
from peft_bsr.errors import AdapterError
from peft_bsr.tuners.base.layer import find_backbone, find_controllers, runs_on_images
from peft_bsr.viz.files import save_figure
from peft_bsr.viz.fonts import families_for

_VEIL = np.array([0.30, 0.42, 0.62])  # a blue that neither black nor white backgrounds have
_OPACITY = 0.8  # how much of a dropped patch the veil hides


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of some images that are left after one reduction.

    Attributes:
        block: Index of the block.
        share: Share of the patches that are left.
        dropped_mass: [B], sum of the scores of the dropped tokens (the sum over all tokens of the block is 1). With a
            fused token it is the sum of the weights in it. None where tokens are merged.
        is_fused: Whether there is a fused token.
        pictures: [B, H, W, 3] in 0 to 1, with dropped patches shaded; merged ones have the mean colour of all patches
            in their token.
    """

    block: int
    share: float
    dropped_mass: np.ndarray | None
    is_fused: bool
    pictures: np.ndarray


def kept_token_pictures(model: nn.Module, pixel_values: Tensor, images: np.ndarray) -> list[KeptTokens]:
    """Run the model and shade the patches that each reduction dropped, or average the colours of those it merged.

    Args:
        model: See `draw_kept_tokens`.
        pixel_values: See `draw_kept_tokens`.
        images: See `draw_kept_tokens`.

    Returns:
        One per reduction, in the order of the blocks.

    Raises:
        AdapterError: If the model has no adapter of ours, or none that reduces tokens.
        UnsupportedModelError: If its tokens are not a grid of patches of one image.
    """
    controllers = find_controllers(model)
    plan = controllers[0].plan if controllers else None
    reductions = {} if plan is None else {i: b.reduction for i, b in enumerate(plan.blocks) if b.reduction}
    with in_mode(False, model), torch.no_grad(), record_routes(model) as routes, ExitStack() as watching:
        scores: list[BlockScores] = []
        kind = next((reduction.score for reduction in reductions.values()), None)  # a plan ranks by one
        if kind is not None:
            scores = watching.enter_context(record_scores(find_backbone(model), controllers[0].spec, kind))
        runs_on_images(model)(pixel_values=pixel_values)
    if not routes:
        raise AdapterError("the model dropped no tokens: its adapter keeps all of them in evaluation, or is disabled.")
    found = []
    grid = controllers[0].spec.grid_at(*pixel_values.shape[-2:])
    for block, route in routes:
        alive, mass = route.alive().unflatten(1, grid).cpu().numpy(), None
        if route.merged is None:
            pictures = [_veil(_coloured(image), kept) for image, kept in zip(images, alive, strict=True)]
            mass = _dropped_mass(next(s for s in scores if s.block == block), route)
        else:
            merged = route.merged.unflatten(1, grid).cpu().numpy()
            pictures = [_blend(_coloured(image), holders) for image, holders in zip(images, merged, strict=True)]
        found.append(KeptTokens(block, float(alive.mean()), mass, reductions[block].fuse, np.stack(pictures)))
    return found


def _dropped_mass(before: BlockScores, route: Route) -> np.ndarray:
    """[B], scores of the tokens of `before` that are not on `route`, summed."""
    assert route.origins is not None, "something was dropped"
    competing = before.scores[:, route.num_prefix : before.scores.shape[1] - route.num_suffix]
    origins = before.route.origins_like(competing[..., None])
    is_kept = (origins[:, :, None] == route.origins[:, None, :]).any(dim=2)
    mass: np.ndarray = competing.masked_fill(is_kept, 0).sum(dim=1).float().cpu().numpy()
    return mass


def draw_kept_tokens(
    model: nn.Module, pixel_values: Tensor, images: np.ndarray, path: str | Path, titles: Sequence[str] | None = None
) -> Path:
    """Run the model and draw one row per image: the image, and the patches that are left after each reduction.

    Dropped patches are shaded blue. The number below is the attention that they had (with a fused token, the sum of the
    weights in it); 100 % is the sum over all tokens of the block. Merged patches have the mean colour of all patches in
    their token. Images are drawn as given, so `images` and `pixel_values` must show the same.

    Args:
        model: A model with an active adapter of ours that reduces tokens.
        pixel_values: [B, C, H, W], the model's input.
        images: [B, H, W, 3], [B, H, W, 1] or [B, H, W], values in 0 to 1.
        path: File to write; its extension sets the format (`.png`, `.svg`, ...).
        titles: One title per image.

    Returns:
        `path`.

    Raises:
        AdapterError: If the model has no adapter of ours, or none that reduces tokens.
    """
    return draw_kept(kept_token_pictures(model, pixel_values, images), images, path, titles)


def draw_kept(
    kept: Sequence[KeptTokens], images: np.ndarray, path: str | Path, titles: Sequence[str] | None = None
) -> Path:
    """Draw the output of `kept_token_pictures`; see `draw_kept_tokens`.

    Args:
        kept: One per reduction.
        images: [B, H, W, 3], [B, H, W, 1] or [B, H, W], values in 0 to 1.
        path: File to write.
        titles: One title per image.

    Returns:
        `path`.
    """
    rows = len(images)
    # a Figure of its own, not pyplot: no global state, no window
    figure = Figure(figsize=(1.6 * (len(kept) + 1), 1.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, len(kept) + 1, squeeze=False)
    families, _ = families_for(titles or ())
    titles_above = ["input", *(f"block {behind.block}: {behind.share:.0%} kept" for behind in kept)]
    for row, image in enumerate(images):
        axes[row, 0].imshow(_coloured(image))
        title = titles[row] if titles else ""
        axes[row, 0].set_ylabel(title, parse_math=False, fontfamily=families)  # a class may be called "$"
        for axis, behind in zip(axes[row, 1:], kept, strict=True):
            axis.imshow(behind.pictures[row])
            mass = behind.dropped_mass
            lost = "fused" if behind.is_fused else "dropped"
            axis.set_xlabel("merged" if mass is None else f"{lost}: {mass[row]:.0%}", fontsize=7)
    for axis, text in zip(axes[0], titles_above, strict=True):
        axis.set_title(text, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with matplotlib.rc_context({"svg.hashsalt": "peft_bsr"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # letters that no font here has are boxes
        return save_figure(figure, path, dpi=150)


def _coloured(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] of an image [H, W, 3], [H, W, 1] or [H, W]."""
    return np.broadcast_to(image[..., None] if image.ndim == 2 else image, (*image.shape[:2], 3))


def _veil(image: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """[H, W, 3] with the patches that are not in `alive` [rows, columns] shaded."""
    is_alive = _of_pixels(image, alive)[..., None]
    return np.where(is_alive, image, (1 - _OPACITY) * image + _OPACITY * _VEIL)


def _blend(image: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """[H, W, 3], each pixel in the mean colour of the patches with its number in `merged` [rows, columns]."""
    number = _of_pixels(image, merged)
    sizes = np.maximum(np.bincount(number.ravel(), minlength=merged.size), 1)
    means = [np.bincount(number.ravel(), image[..., c].ravel(), merged.size) / sizes for c in range(image.shape[2])]
    return np.stack(means, axis=-1)[number]


def _of_pixels(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """[H, W], the value of the nearest of the patches [rows, columns]: the image need not be a multiple of one."""
    row_of, column_of = (np.arange(n) * k // n for n, k in zip(image.shape, patches.shape, strict=False))
    return patches[row_of][:, column_of]
