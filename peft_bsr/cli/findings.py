"""What is found out of a trained adapter for its card and its report."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers

from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.sources import load_model
from peft_bsr.cost import Cost, compare
from peft_bsr.cost.comparison import device_name
from peft_bsr.hub.card import PICTURE
from peft_bsr.registration import package_version
from peft_bsr.report import RunRecord
from peft_bsr.training.images import LabelledImages, collate, to_pictures, with_pixels
from peft_bsr.viz import KeptTokens, draw_kept, kept_token_pictures, saved_by_block

FULL = "full fine-tuning"
_BATCH, _SHOWN = 8, 4  # images that are measured on, and that are drawn


@dataclass
class Findings:
    """What was measured and drawn; empty where it was not."""

    costs: dict[str, Cost] = field(default_factory=dict)
    saved: dict[str, dict[str, float]] = field(default_factory=dict)
    conditions: str = ""
    images: np.ndarray | None = None
    titles: list[str] = field(default_factory=list)
    kept: list[KeptTokens] = field(default_factory=list)
    picture: Path | None = None


def find_out(
    model: Any, settings: TrainSettings, data: LabelledImages, processor: Any, output: Path, is_measured: bool
) -> Findings:
    """Draw what is kept of some test images, and compare with full fine-tuning on some training images.

    Args:
        model: The trained one.
        settings: Of its run.
        data: Its images.
        processor: Its image processor.
        output: Folder for the picture.
        is_measured: Whether to compare.
    """
    found = Findings()
    if reduces_in_use(model):
        examples = with_pixels(data.test, processor)
        shown = collate([examples[i] for i in range(min(_SHOWN, len(data.test)))])
        pixels = shown["pixel_values"].to(model.device)
        found.images = to_pictures(pixels, processor)
        found.titles = [data.labels[label] for label in shown["labels"].tolist()]
        found.kept = kept_token_pictures(model, pixels, found.images)
        found.picture = draw_kept(found.kept, found.images, output / PICTURE, found.titles)
    if is_measured:
        examples = with_pixels(data.train, processor)
        batch = collate([examples[i] for i in range(min(_BATCH, len(data.train)))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        full = load_model(settings.model, data.labels).to(model.device)
        models = {FULL: full, settings.method.upper(): model}
        found.costs = compare(models, batch)
        found.saved = {name: saved_by_block(one, batch) for name, one in models.items()}
        found.conditions = conditions(batch["pixel_values"])
    return found


def reduces_in_use(model: Any) -> bool:
    """Whether the adapter drops tokens when it is used, and not in training alone."""
    return bool(getattr(model.base_model, "reduces_in_evaluation", True) and model.base_model.plan().reduces)


def conditions(images: torch.Tensor) -> str:
    """What a measurement stands under.

    Args:
        images: [B, C, H, W], of the measured batch.
    """
    size = " x ".join(str(side) for side in images.shape[2:])
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    dtype = str(images.dtype).removeprefix("torch.")
    return f"{device_name(images.device)}, {dtype}, batch {len(images)}, {size} px; {named}."


def versions() -> dict[str, str]:
    """Of what a run depends on."""
    return {
        "peft_bsr": package_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "Python": platform.python_version(),
    }


def make_record(
    model: Any,
    settings: TrainSettings,
    found: Findings,
    words: Sequence[str],
    *,
    scores: Mapping[str, float],
    seconds: float,
    log_history: Sequence[Mapping[str, Any]],
    budgets: Sequence[Any],
    command: str,
) -> RunRecord:
    """Everything for the report."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    headline = {
        "test accuracy": f"{scores['accuracy']:.1%}",
        "training": f"{seconds:.0f} s",
        "parameters trained": f"{trained / 1e6:.2f} M",
    }
    if found.costs:
        full, own = found.costs[FULL], found.costs[settings.method.upper()]
        headline["saved activations"] = f"{own.saved_bytes_per_image / full.saved_bytes_per_image:.0%} of full"
        headline["step time"] = f"{own.step_seconds / full.step_seconds:.0%} of full"
    return RunRecord(
        title=f"{settings.method.upper()} of {settings.model} on {settings.dataset}",
        column=model.base_model.column,
        plan=model.base_model.plan(),
        words=words,
        headline=headline,
        log_history=log_history,
        saved_by_block=found.saved,
        costs=found.costs,
        conditions=found.conditions,
        images=found.images,
        titles=found.titles,
        kept=found.kept,
        budgets=budgets,
        settings=asdict(settings),
        versions=versions(),
        command=command,
    )


__all__ = ["FULL", "Findings", "conditions", "find_out", "make_record", "reduces_in_use", "versions"]
