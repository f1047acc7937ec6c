"""Measurements and pictures of a trained adapter, for its model card and its report."""

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
from peft import PeftModel
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from peft_bsr.cli.memory import Peak
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.sources import load_model
from peft_bsr.cost import Cost, compare
from peft_bsr.cost.comparison import device_name
from peft_bsr.data import LabelledImages, collate, open_image, to_pictures, to_rgb, with_pixels
from peft_bsr.errors import InputError
from peft_bsr.hub.card import PICTURE
from peft_bsr.prediction.scoring import Score
from peft_bsr.registration import package_version
from peft_bsr.report import Results, RunRecord
from peft_bsr.training import BudgetRecord
from peft_bsr.training.groups import trained_parameters
from peft_bsr.tuners import METHODS
from peft_bsr.viz import KeptTokens, draw_confusion, draw_kept, kept_token_pictures, saved_by_block
from peft_bsr.viz.fonts import families_for

FULL = "full fine-tuning"
_BATCH, _SHOWN, _WORST = 8, 4, 12  # images for measurements, for pictures, and with the highest loss
_SIDE = 192  # maximum pixels of an image with a high loss
_PEAK = "Predicted by the planner for a training step: weights, optimizer, gradients, activations. Measured: "
_PEAK_NOTES = {
    "cpu": _PEAK
    + "growth of this process from loading the model to the end of training, including images, libraries, and freed "
    "memory that the C library keeps.",
    "cuda": _PEAK + "torch's peak allocation on the device during training and the scoring of epochs.",
}


@dataclass
class RunMeasurements:
    """Measurements and pictures of a run; fields are empty if they were not made."""

    costs: dict[str, Cost] = field(default_factory=dict)
    saved: dict[str, dict[str, float]] = field(default_factory=dict)
    conditions: str = ""
    images: np.ndarray | None = None
    titles: list[str] = field(default_factory=list)
    kept: list[KeptTokens] = field(default_factory=list)
    picture: Path | None = None
    confusion: Path | None = None
    confusion_note: str = ""
    worst: list[tuple[Image.Image, str]] = field(default_factory=list)
    peak: Peak = field(default_factory=Peak)


def draw_pictures(
    found: RunMeasurements, model: PeftModel, data: LabelledImages, processor: BaseImageProcessor, output: Path
) -> None:
    """Draw the kept patches of some test images, if the adapter drops tokens in inference.

    Args:
        found: Gets images, titles and the picture.
        model: Trained model with an adapter of this package.
        data: Images of the run.
        processor: Image processor.
        output: Folder for the picture.
    """
    if not reduces_in_use(model):
        return
    examples = with_pixels(next(data.splits[s] for s in ("test", "validation", "train") if s in data.splits), processor)
    shown = collate([examples[i] for i in range(min(_SHOWN, len(examples)))])
    pixels = shown["pixel_values"].to(model.device)
    found.images = to_pictures(pixels, processor)
    found.titles = [data.label_text(label) for label in shown["labels"].tolist()]
    found.kept = kept_token_pictures(model, pixels, found.images)
    found.picture = draw_kept(found.kept, found.images, output / PICTURE, found.titles)


def draw_confusion_matrix(found: RunMeasurements, score: Score, path: Path) -> None:
    """Draw the confusion matrix, if there is one and it is readable as a picture.

    Args:
        found: Gets the file, or the reason why there is none.
        score: Score of the trained model.
        path: File to write.
    """
    details = score.details()
    if "confusion" not in details:
        return
    try:
        found.confusion = draw_confusion(details["confusion"], details["labels"], path)
    except InputError as error:
        found.confusion_note = f"{error} scores.json has all of it."
    else:
        if not families_for(details["labels"])[1]:  # the picture shows their indices
            found.confusion_note = ", ".join(f"{number}: {name}" for number, name in enumerate(details["labels"]))


def show_worst(found: RunMeasurements, score: Score) -> None:
    """Open the images with the highest loss.

    Args:
        found: Gets the images with their predictions.
        score: Score of the trained model.
    """
    for one in score.worst(_WORST):
        image = to_rgb(open_image(score.rows[one["row"]]["image"]))
        image.thumbnail((_SIDE, _SIDE))
        words = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in one.items()}
        words["file"] = Path(one["file"]).name
        found.worst.append((image, "\n".join(f"{name}: {value}" for name, value in words.items() if name != "row")))


def measure_costs(
    found: RunMeasurements,
    model: PeftModel | PreTrainedModel,
    settings: TrainSettings,
    data: LabelledImages,
    processor: BaseImageProcessor,
) -> None:
    """Compare with full fine-tuning on some training images.

    Args:
        found: Gets costs, bytes by block and conditions.
        model: Trained model.
        settings: Settings of the run.
        data: Images of the run.
        processor: Image processor.
    """
    examples = with_pixels(data.train, processor)
    batch = collate([examples[i] for i in range(min(_BATCH, len(data.train)))])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    full = load_model(settings.model, data.labels, data.problem_type, settings.image_size).to(model.device)
    models = {FULL: full, settings.method.upper(): model}
    costs = compare(models, batch)
    saved = {name: saved_by_block(one, batch) for name, one in models.items()}
    found.costs, found.saved, found.conditions = costs, saved, conditions(batch["pixel_values"])


def reduces_in_use(model: PeftModel) -> bool:
    """Whether the adapter drops tokens in inference, not only in training."""
    return bool(getattr(model.base_model, "reduces_in_evaluation", True) and model.base_model.plan().reduces)


def conditions(images: torch.Tensor) -> str:
    """Conditions of a measurement: device, dtype, batch, image size and versions.

    Args:
        images: Images [B, C, H, W] of the measured batch.
    """
    size = " x ".join(str(side) for side in images.shape[2:])
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    dtype = str(images.dtype).removeprefix("torch.")
    return f"{device_name(images.device)}, {dtype}, batch {len(images)}, {size} px; {named}."


def versions() -> dict[str, str]:
    """Versions of the package and its main dependencies."""
    return {
        "peft_bsr": package_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "Python": platform.python_version(),
    }


def headline_of(
    model: PeftModel | PreTrainedModel,
    settings: TrainSettings,
    found: RunMeasurements,
    scores: Mapping[str, Score],
    *,
    seconds: float,
    kept: str,
) -> dict[str, str]:
    """The main results at the top of the report, name -> text."""
    trained = sum(p.numel() for p in trained_parameters(model).values())
    headline = {}
    for split, score in scores.items():
        name, value = next(iter(score.figures().items()))
        headline[f"{split} {name}"] = in_words(name, value)
    headline |= {"kept": kept, "training": f"{seconds:.0f} s", "parameters trained": f"{trained / 1e6:.2f} M"}
    if str(found.peak):
        headline["peak memory"] = str(found.peak)
    if found.costs:
        full, own = found.costs[FULL], found.costs[settings.method.upper()]
        headline["saved activations"] = f"{own.saved_bytes_per_image / full.saved_bytes_per_image:.0%} of full"
        headline["step time"] = f"{own.step_seconds / full.step_seconds:.0%} of full"
    return headline


def in_words(name: str, value: float) -> str:
    """A metric as text; accuracies and similar metrics in percent."""
    return f"{value:.1%}" if name.endswith(("accuracy", "f1_micro", "f1_macro", "mAP")) else f"{value:.4g}"


def make_record(
    model: PeftModel | PreTrainedModel,
    settings: TrainSettings,
    found: RunMeasurements,
    words: Sequence[str],
    *,
    headline: Mapping[str, str],
    scores: Mapping[str, Score],
    kept_step: int,
    log_history: Sequence[Mapping[str, Any]],
    budgets: Sequence[BudgetRecord],
    command: str,
) -> RunRecord:
    """Collect everything for the report."""
    is_ours = settings.method in METHODS
    return RunRecord(
        title=f"{settings.method.upper()} of {settings.model} on {settings.dataset}",
        spec=model.base_model.spec if is_ours else None,
        plan=model.base_model.plan() if is_ours else None,
        description=words,
        headline=headline,
        log_history=log_history,
        kept_step=kept_step,
        results=_results(scores, found),
        memory=_memory(found.peak),
        memory_note=_PEAK_NOTES.get(found.peak.device, _PEAK_NOTES["cuda"]),
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


def _results(scores: Mapping[str, Score], found: RunMeasurements) -> Results | None:
    """Results on the test images, or else on the validation images, or None."""
    if not scores:
        return None
    split, score = list(scores.items())[-1]
    figures = [(name.replace("_", " "), in_words(name, value)) for name, value in score.figures().items()]
    tables = [("All images", ("", ""), figures), *((t.title, t.columns, t.rows) for t in score.tables())]
    title = f"Results on {len(score.rows)} {split} images"
    return Results(title, tables, found.confusion, found.confusion_note, found.worst)


def _memory(peak: Peak) -> dict[str, int]:
    sizes = {} if peak.predicted is None else {"predicted": peak.predicted.total_bytes}
    return sizes if peak.measured_bytes is None else {**sizes, "measured": peak.measured_bytes}


__all__ = [
    "FULL",
    "RunMeasurements",
    "conditions",
    "draw_confusion_matrix",
    "draw_pictures",
    "headline_of",
    "in_words",
    "make_record",
    "measure_costs",
    "reduces_in_use",
    "show_worst",
    "versions",
]
