"""What a report tells of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from peft_bsr.backbones import ModelSpec
from peft_bsr.cost import Cost
from peft_bsr.engine import Plan
from peft_bsr.training import BudgetRecord
from peft_bsr.viz import KeptTokens


@dataclass(frozen=True)
class Results:
    """What the trained model answered on images that it was not trained on. What is empty has no place on the page.

    Attributes:
        title: Such as `"Results on 400 test images"`.
        tables: Title, headings and rows of each.
        confusion: PNG file, or None.
        note: Below it: names of the classes by number, or why there is no picture.
        worst: The images with the highest loss and what to say of each.
    """

    title: str
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    confusion: Path | None = None
    note: str = ""
    worst: Sequence[tuple[Image, str]] = ()


@dataclass(frozen=True)
class RunRecord:
    """A training run. What is empty has no place on the page.

    Attributes:
        title: Such as `"BSR on digits"`.
        spec: What the model is. None: it has no adapter of this package, and the report no plan.
        plan: What was done to it, or None.
        words: The plan in sentences, see `peft_bsr.tuners.describe_plan`.
        headline: Name -> text of the few numbers that stand on top.
        log_history: Trainer's, `trainer.state.log_history`.
        kept_step: Step whose weights were kept, marked in the curves; None: it is not marked.
        results: On test or validation images, or None.
        memory: Name -> bytes, such as the peak that was predicted and the one that was measured.
        memory_note: What the measured one is of.
        saved_by_block: Name -> bytes an image that each part keeps for backward, from `peft_bsr.viz.saved_by_block`.
        costs: Name -> `Cost`; the first is the reference.
        conditions: Under which memory and costs were measured.
        images: [B, H, W, 3] in 0 to 1, as the model was shown them.
        titles: One text an image.
        kept: Of those images, from `peft_bsr.viz.kept_token_pictures`.
        budgets: ALaST's history, from `ALaSTCallback`.
        settings: Name -> value of what was asked.
        versions: Name -> version.
        command: That makes the run again.
    """

    title: str
    spec: ModelSpec | None
    plan: Plan | None
    words: Sequence[str] = ()
    headline: Mapping[str, str] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    kept_step: int | None = None
    results: Results | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    memory_note: str = ""
    saved_by_block: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    conditions: str = ""
    images: np.ndarray | None = None
    titles: Sequence[str] = ()
    kept: Sequence[KeptTokens] = ()
    budgets: Sequence[BudgetRecord] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


__all__ = ["Results", "RunRecord"]
