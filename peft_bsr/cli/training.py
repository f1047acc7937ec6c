"""Builds a Trainer from settings: arguments, loss, augmentation, optimizer groups, callbacks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from peft_bsr.cli.output import Output
from peft_bsr.cli.resuming import EarlyStopping, RunCallback
from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.sources import check_names
from peft_bsr.compat.transformers_api import use_one_gpu
from peft_bsr.data import LabelledImages, collate, labels_of, with_pixels
from peft_bsr.errors import UsageError, one_line
from peft_bsr.prediction import find_device
from peft_bsr.training import (
    WARMUP_SHARE,
    MixupDataset,
    NonFiniteLossCallback,
    TrainabilityCallback,
    TrainedEMA,
    TrainingLoss,
    balanced_weights,
    param_groups,
)
from peft_bsr.training.augmentation import Augmentation
from peft_bsr.training.scores import BEST_BY, compute_metrics_of
from peft_bsr.training.target_scale import TargetScale
from peft_bsr.tuners import METHODS

_WEIGHT_DECAY = 0.01  # as in the benchmark
_LOWER_IS_BETTER = ("loss", "mae", "mse")  # ends of the names of metrics, also of rmse
_FLAGS = {
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "label_smoothing_factor": "label_smoothing",
}


def training_arguments(settings: TrainSettings, out: Output) -> TrainingArguments:
    """Arguments of the Trainer, checked before anything is read. Without a launcher they are for one GPU.

    Args:
        settings: Settings of the run.
        out: Output of the command; with `--json` there is no progress bar.

    Raises:
        UsageError: If a field is unknown, has its own option, or cannot be used on this machine or with other fields.
    """
    for name in settings.trainer:
        if name in _FLAGS:
            flag = _FLAGS[name].replace("_", "-")
            raise UsageError(f"`--trainer {name}=...`: use the flag `--{flag}` instead.")
    check_names(settings.trainer, list(TrainingArguments.__dataclass_fields__), "field of TrainingArguments")
    device = find_device(settings.device)
    if settings.precision == "fp16" and device == "cpu":
        raise UsageError("`--precision fp16` needs a GPU. On a CPU use bf16 or fp32.")
    workers = settings.workers
    if workers is None:
        workers = 0 if device == "cpu" else min(4, os.cpu_count() or 1)
    values: dict[str, Any] = {
        "output_dir": str(Path(settings.output) / "checkpoints"),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": 32,
        "learning_rate": settings.rate,
        "weight_decay": _WEIGHT_DECAY,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP_SHARE,
        "logging_steps": 0.05,  # of all steps
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "seed": settings.seed,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": device == "cuda",
        "dataloader_num_workers": workers,
        "disable_tqdm": out.is_json,
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        "use_cpu": device == "cpu",
        "torch_compile": settings.compile,
    }
    if settings.keep == "best":
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    try:
        arguments = TrainingArguments(**(values | settings.trainer))
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()  # raises if a package is missing, before anything is loaded
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError(f"Trainer does not accept these settings: {one_line(error)}") from error
    if arguments.metric_for_best_model is not None:
        _set_direction(arguments, settings)
        if "save_total_limit" not in settings.trainer:
            arguments.save_total_limit = 2  # the best and the last: with 1, Trainer deletes the last when it stops
    if others := use_one_gpu(arguments):
        out.note(
            f"one of {others + 1} GPUs is used. For all of them, start a training script of your own with "
            "`accelerate launch`, see docs/distributed.md"
        )
    return arguments


def _set_direction(arguments: TrainingArguments, settings: TrainSettings) -> None:
    """Errors are minimized, other metrics maximized, unless the user says otherwise."""
    if settings.trainer.get("greater_is_better") is None:
        arguments.greater_is_better = not str(arguments.metric_for_best_model).endswith(_LOWER_IS_BETTER)


def fit_to_data(arguments: TrainingArguments, settings: TrainSettings, data: LabelledImages) -> None:
    """Set the metric that selects the best epoch by the labels; without validation images, disable evaluation.

    Raises:
        UsageError: If the best epoch is to be kept, but there are no validation images.
    """
    if data.validation:
        if settings.keep == "best" and "metric_for_best_model" not in settings.trainer:
            arguments.metric_for_best_model = BEST_BY[data.problem_type]
            _set_direction(arguments, settings)
        return
    if arguments.load_best_model_at_end:
        name = "load_best_model_at_end" if "load_best_model_at_end" in settings.trainer else "--keep best"
        raise UsageError(f"`{name}` needs validation images. Give more images, or `--validation-size`.")
    arguments.eval_strategy = IntervalStrategy.NO


def training_loss(settings: TrainSettings, data: LabelledImages) -> TrainingLoss:
    """The loss of the settings.

    Raises:
        ConfigError: If it does not match the labels.
    """
    weights: Any = settings.class_weights
    if weights == "balanced":
        weights = balanced_weights(labels_of(data.train), len(data.labels))
    elif weights is not None and len(weights) != len(data.labels):
        raise UsageError(f"`class_weights` has {len(weights)} numbers, but there are {len(data.labels)} classes.")
    return TrainingLoss(data.problem_type, class_weights=weights, label_smoothing=settings.label_smoothing)


def training_images(
    settings: TrainSettings, data: LabelledImages, processor: BaseImageProcessor
) -> Dataset | MixupDataset:
    """The training images as inputs of the model, augmented."""
    if settings.augment == "none":
        return with_pixels(data.train, processor)
    augment: Any = Augmentation(settings.augment, settings.flip)  # type: ignore[arg-type]
    images = with_pixels(data.train, processor, augment)
    return MixupDataset(images, len(data.labels)) if settings.augment == "strong" else images


def optimizer_maker(
    settings: TrainSettings, model: PeftModel | PreTrainedModel, arguments: TrainingArguments
) -> Callable[[float], torch.optim.Optimizer] | None:
    """Function learning rate -> optimizer with groups by layer, or None to use Trainer's optimizer."""
    if settings.layer_decay is None:
        return None

    def make(rate: float) -> torch.optim.Optimizer:
        groups = param_groups(
            model, learning_rate=rate, layer_decay=settings.layer_decay, weight_decay=arguments.weight_decay
        )
        kind, values = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        made: torch.optim.Optimizer = kind(groups, **{name: v for name, v in values.items() if name != "lr"})
        return made

    return make


def make_trainer(
    model: PeftModel | PreTrainedModel,
    settings: TrainSettings,
    arguments: TrainingArguments,
    data: LabelledImages,
    processor: BaseImageProcessor,
    run: RunCallback,
    scale: TargetScale | None = None,
) -> Trainer:
    """Build the Trainer of a run.

    Args:
        model: Model from `attach`.
        settings: Settings of the run.
        arguments: Arguments from `training_arguments`.
        data: Images with the split `train`, and optionally `validation`.
        processor: Image processor.
        run: Callback that stores the settings and measures time.
        scale: Scale of the targets of a regression. Default None.
    """
    guard = NonFiniteLossCallback(settings.output)
    callbacks: list[TrainerCallback] = [run, guard]
    if settings.method in METHODS:
        callbacks.append(TrainabilityCallback())
    if settings.method in METHODS:
        callbacks += METHODS[settings.method].callbacks()
    if settings.early_stopping:
        callbacks.append(EarlyStopping(settings.early_stopping))
    if settings.ema is not None:
        callbacks.append(TrainedEMA(model, settings.ema))
    make_optimizer = optimizer_maker(settings, model, arguments)
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate if scale is None else scale.collate,
        train_dataset=training_images(settings, data, processor),
        eval_dataset=with_pixels(data.validation, processor) if data.validation else None,
        compute_metrics=compute_metrics_of(data.problem_type, *([] if scale is None else [scale.restore])),
        compute_loss_func=guard.watch(training_loss(settings, data)),
        callbacks=callbacks,
        optimizers=(None if make_optimizer is None else make_optimizer(arguments.learning_rate), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


__all__ = [
    "fit_to_data",
    "make_trainer",
    "optimizer_maker",
    "training_arguments",
    "training_images",
    "training_loss",
]
