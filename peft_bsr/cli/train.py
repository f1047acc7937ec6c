"""Fine-tune with Trainer, keep the adapter with its model card and image processor, write a report."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from peft_bsr.cli.findings import Findings, find_out, make_record
from peft_bsr.cli.images import read_processor, read_training_data
from peft_bsr.cli.output import Output
from peft_bsr.cli.settings import TrainSettings, add_settings, read_settings
from peft_bsr.cli.sources import check_names, find_adapter, load_model, make_config
from peft_bsr.data import LabelledImages, collate, size_of, with_pixels
from peft_bsr.errors import UsageError
from peft_bsr.hub import add_facts, plan_in_words
from peft_bsr.report import write_report
from peft_bsr.training import ALaSTCallback, TrainabilityCallback
from peft_bsr.training.scores import compute_accuracy

EXAMPLES = """\
examples:
  peft-bsr train --model google/vit-base-patch16-224-in21k --dataset beans --epochs 3
  peft-bsr train --model facebook/dinov2-small --method alast --set trainable_blocks_per_step=6 --output outputs/alast
  peft-bsr train --config run.yaml --set trainable_blocks=last:3 --output outputs/last3
  peft-bsr train --config outputs/train/settings.yaml --resume

written below --output: adapter/ (weights, model card, image processor), report.html, summary.json, settings.yaml,
checkpoints/ (one an epoch, the last is kept).
"""
Scores = dict[str, dict[str, float]]  # split -> accuracy and loss
_OURS = ("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_settings(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--no-measuring", action="store_true", help="do not compare with full fine-tuning afterwards")


def run(args: argparse.Namespace, out: Output) -> dict[str, Any]:
    """Run the command."""
    settings = read_settings(args)
    config = make_config(settings.method, settings.options)
    output = Path(settings.output)
    checkpoint = _checkpoint(output / "checkpoints", args.resume)
    training = _training_arguments(settings, out)
    if find_adapter(settings.model) is not None:
        raise UsageError(f"`{settings.model}` is an adapter. Give its base model, or go on with its run by `--resume`.")
    data = read_training_data(settings, out)
    _without_validation(training, data)
    processor = read_processor(
        settings.model, out, image_size=settings.image_size, mean=settings.mean, std=settings.std
    )
    transformers.set_seed(settings.seed)
    model: Any = get_peft_model(load_model(settings.model, data.labels), config)
    attached = model.peft_config["default"]
    words = plan_in_words(attached, model.base_model.column, model.base_model.plan())
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in data.splits.items())
    out.note(f"{settings.model}: {counts} images; {_size_in_words(processor, model.base_model.column)}")
    out.note("\n".join(words))
    output.mkdir(parents=True, exist_ok=True)
    settings.write(output / "settings.yaml")
    callback = ALaSTCallback() if settings.method == "alast" else None
    trainer = _make_trainer(model, training, data, processor, callback)
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    scores = _scores(trainer, data, processor)

    out.note("drawing" if args.no_measuring else "measuring against full fine-tuning on the same batch")
    found = find_out(trainer.model, settings, data, processor, output, is_measured=not args.no_measuring)
    adapter = _save(trainer.model, settings, scores, found, processor, output)
    record = make_record(
        trainer.model,
        settings,
        found,
        words,
        scores=scores,
        seconds=trained.metrics["train_runtime"],
        log_history=trainer.state.log_history,
        budgets=callback.history if callback else (),
        command=shlex.join(["peft-bsr", *args.typed]),
    )
    report = write_report(record, output / "report.html")
    summary = _summary(trainer, settings, scores, found, trained.metrics["train_runtime"], adapter, report)
    (output / "summary.json").write_text(json.dumps(summary, indent=2, default=str), encoding="utf-8")
    out.facts("Trained", record.headline)
    out.say(f"adapter: {adapter}\nreport: {report}")
    return summary


def _checkpoint(folder: Path, resume: bool) -> str | None:
    """The checkpoint to go on from, or None for a new run."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume and found is None:
        raise UsageError(f"`--resume`: there is no checkpoint in `{folder}`.")
    if found is not None and not resume:
        raise UsageError(f"`{folder}` has checkpoints of a run. Go on with `--resume`, or give another `--output`.")
    return found


def _training_arguments(settings: TrainSettings, out: Output) -> TrainingArguments:
    for name in settings.trainer:
        if name in _OURS:
            raise UsageError(f"`--trainer {name}=...`: it has a flag of its own, see `peft-bsr train --help`.")
    check_names(settings.trainer, list(TrainingArguments.__dataclass_fields__), "field of TrainingArguments")
    values = {
        "output_dir": str(Path(settings.output) / "checkpoints"),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": 64,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "logging_steps": 10,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "seed": settings.seed,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": out.is_json,
    }
    return TrainingArguments(**(values | settings.trainer))


def _make_trainer(
    model: PeftModel, training: TrainingArguments, data: LabelledImages, processor: Any, callback: Any
) -> Any:
    trainer: Any = Trainer(
        model=model,
        args=training,
        data_collator=collate,
        train_dataset=with_pixels(data.train, processor),
        eval_dataset=with_pixels(data.validation, processor) if data.validation else None,
        compute_metrics=compute_accuracy,
        callbacks=[TrainabilityCallback(), *([callback] if callback else ())],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _without_validation(training: TrainingArguments, data: LabelledImages) -> None:
    """Epochs are not scored where there is nothing to score them on."""
    if data.validation:
        return
    if training.load_best_model_at_end:
        raise UsageError("`load_best_model_at_end` needs validation images. Give more images, or `--validation-size`.")
    training.eval_strategy = IntervalStrategy.NO


def _size_in_words(processor: Any, column: Any) -> str:
    """`224 x 224 px, 257 tokens`."""
    height, width = size_of(processor)
    patches = (height // column.patch_size[0]) * (width // column.patch_size[1])
    return f"{height} x {width} px, {column.num_prefix + patches} tokens"


def _scores(trainer: Any, data: LabelledImages, processor: Any) -> Scores:
    """Split -> accuracy and loss of the weights that are in the model now, which are those that are saved."""
    scores: Scores = {}
    for split in ("validation", "test"):
        if split in data.splits:
            found = trainer.predict(with_pixels(data.splits[split], processor), metric_key_prefix=split).metrics
            scores[split] = {name: float(found[f"{split}_{name}"]) for name in ("accuracy", "loss")}
    return scores


def _save(model: Any, settings: TrainSettings, scores: Scores, found: Findings, processor: Any, output: Path) -> Path:
    add_facts(
        model,
        dataset=settings.dataset,
        metrics={f"{split} accuracy": of_split["accuracy"] for split, of_split in scores.items()},
        costs=found.costs,
        conditions=found.conditions,
        picture=found.picture,
    )
    adapter = output / "adapter"
    model.save_pretrained(adapter)
    processor.save_pretrained(adapter)
    return adapter


def _summary(
    trainer: Any,
    settings: TrainSettings,
    scores: Scores,
    found: Findings,
    seconds: float,
    adapter: Path,
    report: Path,
) -> dict[str, Any]:
    last = next(reversed(scores), None)  # test, or else validation
    return {
        "model": settings.model,
        "dataset": settings.dataset,
        "method": settings.method,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        **({"split": last, **scores[last]} if last else {}),
        "scores": scores,
        "costs": {name: vars(cost) for name, cost in found.costs.items()},
        "conditions": found.conditions,
        "adapter": str(adapter),
        "report": str(report),
    }
