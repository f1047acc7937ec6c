"""What a run leaves: first the trained model, then its scores, then what may fail without losing either."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_bsr.cli.findings import Findings
from peft_bsr.cli.output import Output
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.sources import METHODS
from peft_bsr.data import LabelledImages, with_pixels
from peft_bsr.errors import headline
from peft_bsr.hub import add_facts, write_card
from peft_bsr.training import ALaSTCallback, BudgetRecord

Scores = dict[str, dict[str, float]]  # split -> accuracy and loss


@contextmanager
def may_fail(what: str, out: Output) -> Iterator[None]:
    """Errors inside are told and not raised: the trained model is saved, and the run has done what it was for.

    Args:
        what: Is made inside, for the message.
        out: The screen.
    """
    try:
        yield
    except Exception as error:
        if out.is_debug:
            traceback.print_exc()
        out.note(f"warning: no {what} ({headline(error)}). The trained model is saved.")


def save_model(model: Any, processor: Any, output: Path) -> Path:
    """The adapter below `adapter/`, or a whole model below `model/`, with its image processor; the folder."""
    folder = output / ("adapter" if isinstance(model, PeftModel) else "model")
    model.save_pretrained(folder)
    if isinstance(model, PeftModel) and not hasattr(model.active_peft_config, "labels"):
        model.get_base_model().config.save_pretrained(folder)  # names the classes, which PEFT's own adapters do not
    processor.save_pretrained(folder)
    return folder


def score(trainer: Any, data: LabelledImages, processor: Any) -> Scores:
    """Split -> accuracy and loss of the weights that are in the model now, which are those that were saved."""
    scores: Scores = {}
    for split in ("validation", "test"):
        if split in data.splits:
            found = trainer.predict(with_pixels(data.splits[split], processor), metric_key_prefix=split).metrics
            scores[split] = {name: float(found[f"{split}_{name}"]) for name in ("accuracy", "loss")}
    return scores


def write_adapter_card(model: Any, settings: TrainSettings, scores: Scores, found: Findings, folder: Path) -> None:
    """The model card with what was measured; nothing but the card is written."""
    if settings.method not in METHODS:
        return
    add_facts(
        model,
        dataset=settings.dataset,
        metrics={f"{split} accuracy": of_split["accuracy"] for split, of_split in scores.items()},
        costs=found.costs,
        conditions=found.conditions,
        picture=found.picture,
    )
    write_card(model.peft_config[model.active_adapter], folder)


def write_summary(
    trainer: Any,
    settings: TrainSettings,
    scores: Scores,
    found: Findings,
    *,
    seconds: float,
    folder: Path,
    report: Path | None,
) -> dict[str, Any]:
    """`summary.json`, and what it says."""
    last = next(reversed(scores), None)  # test, or else validation
    summary = {
        "model": settings.model,
        "dataset": settings.dataset,
        "method": settings.method,
        "learning_rate": settings.learning_rate,
        "steps": trainer.state.global_step,
        "kept_step": kept_step(trainer),
        "seconds": seconds,
        **({"split": last, **scores[last]} if last else {}),
        "scores": scores,
        "costs": {name: vars(cost) for name, cost in found.costs.items()},
        "conditions": found.conditions,
        folder.name: str(folder),
        "report": None if report is None else str(report),
    }
    path = Path(settings.output) / "summary.json"
    path.write_text(json.dumps(summary, indent=2, default=str), encoding="utf-8")
    return summary


def kept_step(trainer: Any) -> int:
    """The step whose weights were kept: the best by validation, or the last."""
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    return int(best or state.global_step)


def budgets_of(trainer: Any) -> list[BudgetRecord]:
    """What an ALaST schedule did since the last `--resume`; nothing with another method."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback.history for callback in callbacks if isinstance(callback, ALaSTCallback)), [])


__all__ = [
    "Scores",
    "budgets_of",
    "kept_step",
    "may_fail",
    "save_model",
    "score",
    "write_adapter_card",
    "write_summary",
]
