"""Activations kept for backward, as a bar chart over the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from peft_bsr.backbones import probe_model
from peft_bsr.cost import saved_by_module
from peft_bsr.errors import InputError
from peft_bsr.training.side_effect_free import side_effect_free
from peft_bsr.tuners.base.layer import ROOT, find_controllers
from peft_bsr.viz.files import save_figure


def saved_by_block(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Bytes per image that a training forward keeps for backward, by part of the model.

    Args:
        model: Called as `model(**batch)`, with a `loss` in the output. It is not changed, ALaST's budgets included.
        batch: Inputs and labels, first dimension = images.

    Returns:
        `"embeddings"`, `"0"`, `"1"`, ..., `"head"` -> bytes, in the order of the forward.
    """
    controllers = find_controllers(model)
    is_wrapped = hasattr(model, "get_base_model")
    spec = controllers[0].spec if controllers else probe_model(getattr(model, "get_base_model", lambda: model)())
    root = ROOT if is_wrapped else ""
    blocks, head = ([f"{root}{spec.full_name(name)}." for name in names] for names in (spec.blocks, spec.head))
    with side_effect_free(model):
        saved = saved_by_module(model, lambda: model(**batch).loss)
    images = len(next(iter(batch.values())))
    parts = dict.fromkeys(["embeddings", *map(str, range(spec.depth)), "head"], 0.0)
    part = "embeddings"
    for name, count in saved.items():
        index = next((i for i, block in enumerate(blocks) if f"{name}.".startswith(block)), None)
        if index is not None:
            part = str(index)
        elif part != "embeddings" or f"{name}.".startswith(tuple(head)):
            part = "head"
        parts[part] += count / images
    return parts


def draw_saved_memory(models: Mapping[str, nn.Module], batch: Mapping[str, Tensor], path: str | Path) -> Path:
    """Draw the activations that each block of each model keeps for backward, per image, as a bar chart.

    Args:
        models: Name -> model, all of the same depth; see `saved_by_block`.
        batch: See `saved_by_block`.
        path: File to write; its extension sets the format (`.png`, `.svg`, `.pdf`).

    Returns:
        `path`.

    Raises:
        InputError: If there is no model, or if their depths differ.
    """
    found = {name: saved_by_block(model, batch) for name, model in models.items()}
    if not found or len({tuple(parts) for parts in found.values()}) != 1:
        depths = {name: len(parts) - 2 for name, parts in found.items()}
        raise InputError(f"`models` must have the same depth, found {depths}. Draw the others in a separate picture.")
    parts = next(iter(found.values()))
    places, width = np.arange(len(parts)), 0.8 / len(found)
    figure = Figure(figsize=(max(8.0, 0.6 * len(parts)), 3.2), layout="constrained")
    axis = figure.subplots()
    for number, (name, saved) in enumerate(found.items()):
        heights = np.array(list(saved.values())) / 2**20
        offset = (number - (len(found) - 1) / 2) * width
        axis.bar(places + offset, heights, width, label=f"{name}: {heights.sum():.1f} MiB")
    axis.set_xticks(places, list(parts), fontsize=8)
    axis.set_xlabel("block")
    axis.set_ylabel("kept for backward, MiB per image", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a "$"
    return save_figure(figure, path, dpi=150)


__all__ = ["draw_saved_memory", "saved_by_block"]
