"""What a run leaves: first the trained model, then its scores, then what may fail without losing either."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_bsr.cli.measurements import RunMeasurements
from peft_bsr.cli.output import Output
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.data import LabelledImages
from peft_bsr.errors import headline
from peft_bsr.hub import add_facts, write_card
from peft_bsr.prediction import to_predictor
from peft_bsr.prediction.scoring import Score, score
from peft_bsr.training import BudgetRecord
from peft_bsr.tuners import METHODS

Scores = dict[str, Score]  # split -> what the trained model answered


@contextmanager
def may_fail(what: str, out: Output, comfort: str = "The trained model is saved.") -> Iterator[None]:
    """Errors inside are told and not raised: the run does what it is for all the same.

    Args:
        what: Is made inside, for the message.
        out: The screen.
        comfort: Ends the message.
    """
    try:
        yield
    except Exception as error:
        if out.is_debug:
            traceback.print_exc()
        out.note(f"warning: no {what} ({headline(error)}). {comfort}")


def trained_model(trainer: Any) -> Any:
    """The model without what Trainer put around it for training, autocast included: it answers as `evaluate` does."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)


def save_model(model: Any, processor: Any, output: Path) -> Path:
    """The adapter below `adapter/`, or a whole model below `model/`, with its image processor; the folder."""
    folder = output / ("adapter" if isinstance(model, PeftModel) else "model")
    model.save_pretrained(folder)
    if isinstance(model, PeftModel) and not hasattr(model.active_peft_config, "labels"):
        model.get_base_model().config.save_pretrained(folder)  # names the classes, which PEFT's own adapters do not
    processor.save_pretrained(folder)
    return folder


def score_all(
    model: Any, data: LabelledImages, processor: Any, *, batch_size: int, workers: int | None, progress: bool
) -> Scores:
    """Validation and test scores of the weights that were saved, by the function that `evaluate` calls.

    Args:
        model: From `trained_model`.
        data: Its images.
        processor: Its image processor.
        batch_size: See `peft_bsr.prediction.scoring.score`.
        workers: The same.
        progress: The same.
    """
    predictor = to_predictor(model, processor)
    return {
        split: score(predictor, data.splits[split], batch_size=batch_size, workers=workers, progress=progress)
        for split in ("validation", "test")
        if split in data.splits
    }


def write_scores(scores: Scores, path: Path) -> None:
    """For each split what `peft-bsr evaluate --json` says of it."""
    found = {split: {"images": len(one.rows), **one.figures(), **one.details()} for split, one in scores.items()}
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def write_adapter_card(
    model: Any, settings: TrainSettings, scores: Scores, found: RunMeasurements, folder: Path
) -> None:
    """The model card with what was measured; nothing but the card is written."""
    if settings.method not in METHODS:
        return
    figures = {f"{split} {name}": v for split, one in scores.items() for name, v in one.figures().items()}
    last = last_of(scores)
    tables = scores[last].tables()[:1] if last else []
    add_facts(
        model,
        dataset=settings.dataset,
        metrics={name: value for name, value in figures.items() if not name.endswith(" loss")},
        tables=[(t.title, t.columns, t.rows) for t in tables],
        costs=found.costs,
        conditions=found.conditions,
        picture=found.picture,
    )
    write_card(model.peft_config[model.active_adapter], folder)


def last_of(scores: Scores) -> str | None:
    """Test, or else validation, or None."""
    return next(reversed(scores), None)


def write_summary(
    trainer: Any,
    settings: TrainSettings,
    scores: Scores,
    found: RunMeasurements,
    *,
    seconds: float,
    folder: Path,
    report: Path | None,
) -> dict[str, Any]:
    """`summary.json`, and what it says."""
    figures = {split: one.figures() for split, one in scores.items()}
    last = last_of(scores)
    summary = {
        "model": settings.model,
        "dataset": settings.dataset,
        "method": settings.method,
        "learning_rate": settings.learning_rate,
        "steps": trainer.state.global_step,
        "kept_step": kept_step(trainer),
        "kept_epoch": kept_epoch(trainer),
        "seconds": seconds,
        **({"split": last, **figures[last]} if last else {}),
        "scores": figures,
        "peak_memory": found.peak.to_dict(),
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


def kept_epoch(trainer: Any) -> float:
    """The epoch that `kept_step` ended, or the part of it that was trained."""
    step, state = kept_step(trainer), trainer.state
    epochs = [entry["epoch"] for entry in state.log_history if entry["step"] == step and "epoch" in entry]
    return float(epochs[-1] if epochs else state.epoch)


def kept_in_words(trainer: Any) -> str:
    """`epoch 2 of 3 (step 12 of 18)`: whose weights were kept."""
    epochs, state = f"epoch {kept_epoch(trainer):.3g} of {trainer.state.epoch:.3g}", trainer.state
    return f"{epochs} (step {kept_step(trainer)} of {state.global_step})"


def budgets_of(trainer: Any) -> list[BudgetRecord]:
    """What a schedule of budgets did since the last `--resume`; nothing with a method that has none."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback.history for callback in callbacks if hasattr(callback, "history")), [])


__all__ = [
    "Scores",
    "budgets_of",
    "kept_epoch",
    "kept_in_words",
    "kept_step",
    "last_of",
    "may_fail",
    "save_model",
    "score_all",
    "trained_model",
    "write_adapter_card",
    "write_scores",
    "write_summary",
]
