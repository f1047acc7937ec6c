"""The content of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL.Image import Image

from peft_bsr.backbones import ModelSpec
from peft_bsr.cost import Cost
from peft_bsr.engine import Plan
from peft_bsr.training import BudgetRecord
from peft_bsr.viz import KeptTokens


@dataclass(frozen=True)
class Results:
    """Results of the trained model on images that it was not trained on. Empty fields are not shown.

    Attributes:
        title: Title, such as `"Results on 400 test images"`.
        tables: Title, headings and rows of each table.
        confusion: PNG file of the confusion matrix, or None.
        note: Text below it: names of the classes by index, or why there is no picture.
        worst: The images with the highest loss, with a text for each.
    """

    title: str
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    confusion: Path | None = None
    note: str = ""
    worst: Sequence[tuple[Image, str]] = ()


@dataclass(frozen=True)
class RunRecord:
    """A training run. Empty fields are not shown.

    Attributes:
        title: Title, such as `"BSR on digits"`.
        spec: Description of the model. None: it has no adapter of this package, and no plan is shown.
        plan: Plan of the adapter, or None.
        description: The plan in sentences, see `peft_bsr.tuners.describe_plan`.
        headline: Name -> text of the key figures at the top.
        log_history: `trainer.state.log_history`.
        kept_step: Step whose weights were saved, marked in the curves. None: no mark.
        results: Results on test or validation images, or None.
        memory: Name -> bytes, such as the predicted and the measured peak.
        memory_note: How the peak was measured.
        saved_by_block: Name -> bytes per image that each part keeps for backward, from `peft_bsr.viz.saved_by_block`.
        costs: Name -> `Cost`; the first is the reference.
        conditions: Conditions under which memory and costs were measured.
        images: Input images [B, H, W, 3] in 0 to 1.
        titles: One title per image.
        kept: Kept tokens of these images, from `peft_bsr.viz.kept_token_pictures`.
        budgets: ALaST's history, from `ALaSTCallback`.
        settings: Name -> value of each setting.
        versions: Name -> version.
        command: Command that repeats the run.
    """

    title: str
    spec: ModelSpec | None
    plan: Plan | None
    description: Sequence[str] = ()
    headline: Mapping[str, str] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, float]] = ()
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
    settings: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


__all__ = ["Results", "RunRecord"]
