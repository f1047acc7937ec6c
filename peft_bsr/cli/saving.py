"""Saves the results of a run: the trained model first, then its scores, then outputs that may fail."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from transformers import BaseImageProcessor, PreTrainedModel, Trainer

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

Scores = dict[str, Score]  # split -> score of the trained model


@contextmanager
def may_fail(what: str, out: Output, comfort: str = "The trained model is saved.") -> Iterator[None]:
    """Context manager: print errors as warnings, so that the run continues.

    Args:
        what: Name of the output, for the message.
        out: Output of the command.
        comfort: Last sentence of the message.
    """
    try:
        yield
    except Exception as error:
        if out.is_debug:
            traceback.print_exc()
        out.note(f"warning: no {what} ({headline(error)}). {comfort}")


def trained_model(trainer: Trainer) -> PeftModel | PreTrainedModel:
    """The model without Trainer's wrappers, including autocast, so that it predicts as in `evaluate`."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)


def save_model(model: PeftModel | PreTrainedModel, processor: BaseImageProcessor, output: Path) -> Path:
    """Save the adapter to `adapter/`, or a whole model to `model/`, with its image processor; return the folder."""
    folder = output / ("adapter" if isinstance(model, PeftModel) else "model")
    model.save_pretrained(folder)
    if isinstance(model, PeftModel) and not hasattr(model.active_peft_config, "labels"):
        model.get_base_model().config.save_pretrained(folder)  # names the classes, which PEFT's own adapters do not
    processor.save_pretrained(folder)
    return folder


def score_all(
    model: PeftModel | PreTrainedModel,
    data: LabelledImages,
    processor: BaseImageProcessor,
    *,
    batch_size: int,
    workers: int | None,
    progress: bool,
) -> Scores:
    """Validation and test scores of the saved weights, computed as in `evaluate`.

    Args:
        model: Model from `trained_model`.
        data: Images of the run.
        processor: Image processor.
        batch_size: See `peft_bsr.prediction.scoring.score`.
        workers: See `peft_bsr.prediction.scoring.score`.
        progress: See `peft_bsr.prediction.scoring.score`.
    """
    predictor = to_predictor(model, processor)
    return {
        split: score(predictor, data.splits[split], batch_size=batch_size, workers=workers, progress=progress)
        for split in ("validation", "test")
        if split in data.splits
    }


def write_scores(scores: Scores, path: Path) -> None:
    """Write the output of `peft-bsr evaluate --json` for each split."""
    found = {split: {"images": len(one.rows), **one.figures(), **one.details()} for split, one in scores.items()}
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def write_adapter_card(
    model: PeftModel,
    settings: TrainSettings,
    scores: Scores,
    found: RunMeasurements,
    folder: Path,
    *,
    image_size: tuple[int, int],
) -> None:
    """Write the model card with the measurements; `image_size` is (height, width) in pixels."""
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
        image_size=image_size,
    )
    write_card(model.peft_config[model.active_adapter], folder)


def last_of(scores: Scores) -> str | None:
    """Name of the last split: test, or else validation, or None."""
    return next(reversed(scores), None)


def write_summary(
    trainer: Trainer,
    settings: TrainSettings,
    scores: Scores,
    found: RunMeasurements,
    *,
    seconds: float,
    folder: Path,
    report: Path | None,
) -> dict[str, object]:
    """Write `summary.json`, and return its contents."""
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


def kept_step(trainer: Trainer) -> int:
    """Step of the kept weights: the best by validation, or the last."""
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    return int(best or state.global_step)


def kept_epoch(trainer: Trainer) -> float:
    """Epoch of `kept_step`; a fraction if training stopped within an epoch."""
    step, state = kept_step(trainer), trainer.state
    epochs = [entry["epoch"] for entry in state.log_history if entry["step"] == step and "epoch" in entry]
    return float(epochs[-1] if epochs else state.epoch)


def kept_in_words(trainer: Trainer) -> str:
    """Epoch and step of the kept weights: `epoch 2 of 3 (step 12 of 18)`."""
    epochs, state = f"epoch {kept_epoch(trainer):.3g} of {trainer.state.epoch:.3g}", trainer.state
    return f"{epochs} (step {kept_step(trainer)} of {state.global_step})"


def budgets_of(trainer: Trainer) -> list[BudgetRecord]:
    """Records of an ALaST schedule since the last `--resume`; empty with other methods."""
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
