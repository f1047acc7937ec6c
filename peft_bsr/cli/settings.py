"""Settings of a training run, from a YAML file and command-line options that override it."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from peft_bsr.cli.images import DATA_HELP, SIZE_HELP, add_columns, add_sizes, add_task, check_task
from peft_bsr.cli.methods import ALL_METHODS, BASELINES, CONFIGS
from peft_bsr.cli.sources import check_names
from peft_bsr.cli.values import read_bool, read_fields, read_file, read_pairs
from peft_bsr.data import DIGITS
from peft_bsr.errors import UsageError
from peft_bsr.problem_type import TASKS
from peft_bsr.training import default_learning_rate
from peft_bsr.tuners import METHODS

# name -> (type, minimum, maximum, whether the ends are allowed); None is allowed if there is no value
_NUMBERS: dict[str, tuple[type, float, float, bool]] = {
    "epochs": (float, 0, inf, False),
    "max_steps": (int, -1, inf, True),
    "batch_size": (int, 1, inf, True),
    "learning_rate": (float, 0, inf, False),
    "image_size": (int, 1, inf, True),
    "test_size": (float, 0, inf, True),
    "validation_size": (float, 0, inf, True),
    "seed": (int, 0, 2**32 - 1, True),
    "label_smoothing": (float, 0, 0.999, True),
    "layer_decay": (float, 0, 1, False),
    "ema": (float, 0, 0.999999, True),
    "early_stopping": (int, 1, inf, True),
    "workers": (int, 0, 256, True),
}
_CACHED = [
    name for name, info in METHODS.items() if not info.is_dynamic
]  # methods whose frozen blocks are the same in every step
_SWITCHES = ("skip_bad", "flip", "compile", "cache")
_CHOICES = {
    "augment": ("none", "light", "strong"),
    "keep": ("last", "best"),
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("cpu", "cuda", "mps"),
    "task": tuple(TASKS),
}


@dataclass
class TrainSettings:
    """Settings of a training run. Names are those of the YAML file and, with dashes, of the command-line options.

    Attributes:
        model: Hub id or folder of the base model.
        dataset: See `peft_bsr.data.load_images`. Default digits.
        image_column: See `peft_bsr.data.load_images`.
        label_column: See `peft_bsr.data.load_images`; several columns are a list, or `a,b,c`.
        task: `"classification"`, `"multilabel"` or `"regression"`. Default None: determined from the labels (lists,
            strings with a `|`, fractions); integers are classes.
        test_size: See `peft_bsr.data.put_aside`.
        validation_size: See `peft_bsr.data.put_aside`.
        skip_bad: Whether to continue without images that cannot be decoded. Default False.
        method: One of `peft_bsr.tuners.METHODS`, or a baseline: `"lora"`, `"full"`, `"linear"`. Default bsr.
        options: Fields of the method's configuration (`--set`).
        epochs: Number of epochs. Default 3.
        max_steps: Maximum number of optimizer steps. Default -1: by epochs.
        batch_size: Images per step. Default 32.
        learning_rate: Maximum learning rate, or `"auto"` for a short sweep. Default by method, see
            `peft_bsr.training.LEARNING_RATES`.
        image_size: Pixels per side. Default None: the size of the model's own processor.
        mean: Mean of each channel, see `peft_bsr.data.load_processor`. Default None: the mean of the processor.
        std: Standard deviation of each channel. Default None: that of the processor.
        augment: `"none"`, `"light"` or `"strong"` (with Mixup and CutMix). Default none.
        flip: Whether augmentation may flip images. Default True.
        class_weights: `"balanced"`, or a number for each class. Default None.
        label_smoothing: Label smoothing. Default 0.
        layer_decay: Factor of the learning rate from one block to the one before it. Default None: no decay.
        ema: Decay of the exponential moving average of the trained weights. Default None: no average.
        early_stopping: Stop after this many epochs without a better validation score. Default None.
        keep: `"last"` or `"best"` epoch, by validation accuracy (several labels: micro F1; a regression: loss). Default
            last, with early stopping best.
        precision: `"fp32"`, `"bf16"` or `"fp16"`. Default fp32.
        device: `"cpu"`, `"cuda"` or `"mps"`. Default None: an accelerator if there is one.
        workers: Processes that load images. Default 0 on a CPU, else up to 4.
        compile: Whether to compile the model. Default False.
        cache: Whether to cache the outputs of frozen leading blocks on disk. Default False.
        seed: Seed of the head and the order of the images. Default 0.
        output: Output folder. Default outputs/train.
        trainer: Further fields of transformers' `TrainingArguments` (`--trainer`).

    Raises:
        UsageError: If a value is invalid.
    """

    model: str
    dataset: str = DIGITS
    image_column: str | None = None
    label_column: str | list[str] | None = None
    task: str | None = None
    test_size: float | None = None
    validation_size: float | None = None
    skip_bad: bool = False
    method: str = "bsr"
    options: dict[str, Any] = field(default_factory=dict)
    epochs: float = 3
    max_steps: int = -1
    batch_size: int = 32
    learning_rate: float | str | None = None
    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    augment: str = "none"
    flip: bool = True
    class_weights: str | list[float] | None = None
    label_smoothing: float = 0.0
    layer_decay: float | None = None
    ema: float | None = None
    early_stopping: int | None = None
    keep: str | None = None
    precision: str = "fp32"
    device: str | None = None
    workers: int | None = None
    compile: bool = False
    cache: bool = False
    seed: int = 0
    output: str = "outputs/train"
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in ALL_METHODS:
            raise UsageError(f"`method: {self.method}` is unknown. Use one of {', '.join(ALL_METHODS)}.")
        for name in ("options", "trainer"):
            if not isinstance(getattr(self, name), dict):
                raise UsageError(f"`{name}: {getattr(self, name)}` must be names and values.")
        if self.method in CONFIGS:
            self.options = read_fields(self.options, CONFIGS[self.method])
        self.trainer = read_fields(self.trainer, TrainingArguments)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in (None, *choices):
                raise UsageError(f"`{name}: {getattr(self, name)}` is unknown. Use one of {', '.join(choices)}.")
        for name in _SWITCHES:
            setattr(self, name, read_bool(name, getattr(self, name)))
        for name in _NUMBERS:
            if getattr(self, name) is not None and not (name == "learning_rate" and self.learning_rate == "auto"):
                setattr(self, name, _number(name, getattr(self, name)))
        if self.max_steps == 0:
            raise UsageError("`max_steps: 0` trains nothing. Use -1 to train by epochs.")
        if self.class_weights not in (None, "balanced") and not isinstance(self.class_weights, list):
            raise UsageError(f"`class_weights: {self.class_weights}` must be `balanced`, or a number for each class.")
        if self.cache and (self.augment != "none" or self.method not in _CACHED):
            raise UsageError(
                "`cache` stores the output of frozen blocks for fixed images: it needs `augment: none` and one "
                f"of the methods {', '.join(_CACHED)}."
            )
        if self.early_stopping and self.keep == "last":
            raise UsageError("`early_stopping` keeps the best epoch. Leave out `keep: last`.")
        if self.task:
            check_task(self, TASKS[self.task])
        if self.keep is None:
            self.keep = "best" if self.early_stopping else "last"

    @property
    def rate(self) -> float:
        """The given learning rate, or the default of the method."""
        if isinstance(self.learning_rate, float):
            return self.learning_rate
        options = read_fields(self.options, CONFIGS[self.method]) if self.method in METHODS else None
        return default_learning_rate(self.method, options)

    def write(self, path: Path) -> None:
        """Write a YAML file for `--config`."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False), encoding="utf-8")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options. They have no defaults, so that values of the file are not overridden."""
    add = parser.add_argument
    add("--config", type=Path, help="YAML file with the names below; flags override it")
    add("--model", help="Hub id or folder of the base model")
    add("--dataset", help=DATA_HELP)
    add_columns(parser)
    add_task(parser)
    add_sizes(parser)
    add("--method", help=f"{', '.join(METHODS)} (default bsr); or {', '.join(BASELINES)}, to compare with")
    add("--set", action="append", metavar="NAME=VALUE", help="option of the method; may be repeated")
    add("--epochs", help="default 3")
    add("--max-steps", help="stop after so many steps (default: by epochs)")
    add("--batch-size", help="images per step (default 32)")
    add("--learning-rate", help="a number, or auto for a short sweep (default by method: bsr 1e-3, lora 3e-3, ...)")
    add("--image-size", help=SIZE_HELP)
    add("--mean", type=float, nargs=3, help="of the channels (default: the model's own processor's)")
    add("--std", type=float, nargs=3, help="of the channels (default: the model's own processor's)")
    add("--augment", help="none (default), light or strong (with Mixup and CutMix)")
    add("--no-flip", dest="flip", action="store_const", const=False, help="augment without flips, for digits and text")
    add("--class-weights", help="balanced: all classes have the same weight in the loss")
    add("--label-smoothing", help="share of a label spread over all classes, such as 0.1")
    add("--layer-decay", help="factor on the learning rate from block to block, such as 0.75")
    add("--ema", nargs="?", const=0.999, metavar="DECAY", help="average the trained weights (decay 0.999)")
    add("--early-stopping", metavar="N", help="stop after N epochs without a better validation score")
    add("--keep", help="last (default) or best epoch by validation")
    add("--precision", help="fp32 (default), bf16 or fp16")
    add("--device", help="cpu, cuda or mps (default: the best available)")
    add("--workers", help="processes that load images (default: 0 on a CPU, else up to 4)")
    add("--compile", action="store_const", const=True, help="compile the model")
    add("--cache", action="store_const", const=True, help="cache the output of the frozen leading blocks on disk")
    add("--seed", help="default 0")
    add("--output", help="output folder (default outputs/train)")
    add("--trainer", action="append", metavar="NAME=VALUE", help="field of TrainingArguments")


def read_settings(args: argparse.Namespace) -> TrainSettings:
    """Read the settings from the file, and override them with the options.

    Raises:
        UsageError: If the file cannot be read, or a name or value is invalid.
    """
    values = {} if args.config is None else read_file(args.config)
    known = [f.name for f in fields(TrainSettings)]
    check_names(values, known, f"setting (in {args.config})")
    given = {name: getattr(args, name) for name in known if getattr(args, name, None) is not None}
    trainer = given.pop("trainer", None)
    if "early_stopping" in given and "keep" not in given and values.get("keep") == "last":
        del values["keep"]  # such as the stored default of a run that is resumed
    values |= given
    for name, pairs in (("options", args.set), ("trainer", trainer)):
        if pairs:
            values[name] = {**(values.get(name) or {}), **read_pairs(pairs)}
    if not values.get("model"):
        raise UsageError("there is no base model. Pass `--model`, or set `model:` in the file of `--config`.")
    return TrainSettings(**{name: value for name, value in values.items() if value is not None})


def _number(name: str, value: float | str) -> float:
    kind, low, high, has_end = _NUMBERS[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(f"`{name}: {value}` must be a number.") from None
    if kind is int and number % 1:
        raise UsageError(f"`{name}: {value}` must be an integer.")
    if not isfinite(number) or not low <= number <= high or (number == low and not has_end):
        least = f"at least {low:g}" if has_end else f"above {low:g}"
        raise UsageError(f"`{name}: {value}` must be {least}{'' if high == inf else f' and at most {high:g}'}.")
    return kind(number)


__all__ = ["TrainSettings", "add_settings", "read_settings"]
