"""What a training run is asked: a YAML file, and flags over it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from peft_bsr.cli.images import DATA_HELP, add_columns, add_sizes
from peft_bsr.cli.sources import METHODS, check_names
from peft_bsr.cli.values import Loader, read_fields, read_pairs
from peft_bsr.data import DIGITS
from peft_bsr.errors import UsageError

LEARNING_RATES = {"bsr": 2e-4, "alast": 2e-4, "synqt": 1e-3}
_OPTIONAL = ("learning_rate", "image_size", "test_size", "validation_size")
_NUMBERS = {
    "epochs": float,
    "max_steps": int,
    "batch_size": int,
    "learning_rate": float,
    "image_size": int,
    "test_size": float,
    "validation_size": float,
    "seed": int,
}


@dataclass
class TrainSettings:
    """One training run. The names are those of the YAML file and, with dashes, of the flags.

    Attributes:
        model: Hub id or folder of the base model.
        dataset: See `peft_bsr.data.load_images`. Default digits.
        image_column: See `peft_bsr.data.load_images`.
        label_column: The same.
        test_size: See `peft_bsr.data.put_aside`.
        validation_size: The same.
        skip_bad: Whether to go on without images that cannot be decoded. Default False.
        method: `"bsr"`, `"alast"` or `"synqt"`. Default bsr.
        options: Fields of the method's configuration (`--set`).
        epochs: Default 3.
        max_steps: Stop after so many optimizer steps. Default -1: by epochs.
        batch_size: Images a step. Default 32.
        learning_rate: At its highest. Default by the method: 2e-4, synqt 1e-3.
        image_size: Pixels. Default what the model's own processor makes.
        mean: Of the channels, see `peft_bsr.data.load_processor`. Default the processor's.
        std: The same.
        seed: Of head and order. Default 0.
        output: Folder. Default outputs/train.
        trainer: Further fields of transformers' `TrainingArguments` (`--trainer`).
    """

    model: str
    dataset: str = DIGITS
    image_column: str | None = None
    label_column: str | None = None
    test_size: float | None = None
    validation_size: float | None = None
    skip_bad: bool = False
    method: str = "bsr"
    options: dict[str, Any] = field(default_factory=dict)
    epochs: float = 3
    max_steps: int = -1
    batch_size: int = 32
    learning_rate: float | None = None
    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    seed: int = 0
    output: str = "outputs/train"
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"`method: {self.method}` is unknown. Use one of {', '.join(METHODS)}.")
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            try:
                setattr(self, name, kind(value))
            except (TypeError, ValueError):
                raise UsageError(f"`{name}: {value}` is no number.") from None
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.method]
        for name in ("options", "trainer"):
            if not isinstance(getattr(self, name), dict):
                raise UsageError(f"`{name}: {getattr(self, name)}` must be names and values.")
        self.options = read_fields(self.options, METHODS[self.method])
        self.trainer = read_fields(self.trainer, TrainingArguments)

    def write(self, path: Path) -> None:
        """As a YAML file that `--config` reads."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False), encoding="utf-8")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Flags; none has a default, so that a file's values stay."""
    parser.add_argument("--config", type=Path, help="YAML file with the names below; flags count over it")
    parser.add_argument("--model", help="Hub id or folder of the base model")
    parser.add_argument("--dataset", help=DATA_HELP)
    add_columns(parser)
    add_sizes(parser)
    parser.add_argument("--method", help="bsr (default), alast or synqt")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="option of the method, may be repeated")
    parser.add_argument("--epochs", type=float, help="default 3")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps (default: by epochs)")
    parser.add_argument("--batch-size", type=int, help="images a step (default 32)")
    parser.add_argument("--learning-rate", type=float, help="default 2e-4, synqt 1e-3")
    parser.add_argument("--image-size", type=int, help="pixels (default: what the model's own processor makes)")
    parser.add_argument("--mean", type=float, nargs=3, help="of the channels (default: the model's own processor's)")
    parser.add_argument("--std", type=float, nargs=3, help="of the channels (default: the model's own processor's)")
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--output", help="folder of what is written (default outputs/train)")
    parser.add_argument("--trainer", action="append", metavar="NAME=VALUE", help="field of TrainingArguments")


def read_settings(args: argparse.Namespace) -> TrainSettings:
    """The file's values, and over them the flags'.

    Raises:
        UsageError: If the file cannot be read, or a name or value is not understood.
    """
    values = {} if args.config is None else _read_file(args.config)
    known = [f.name for f in fields(TrainSettings)]
    check_names(values, known, f"setting (in {args.config})")
    given = {name: getattr(args, name) for name in known if getattr(args, name, None) is not None}
    trainer = given.pop("trainer", None)
    values |= given
    for name, pairs in (("options", args.set), ("trainer", trainer)):
        if pairs:
            values[name] = {**(values.get(name) or {}), **read_pairs(pairs)}
    if not values.get("model"):
        raise UsageError("give a base model: `--model`, or `model:` in the file of `--config`.")
    return TrainSettings(**{name: value for name, value in values.items() if value is not None})


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"`--config {path}` cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"`--config {path}` is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise UsageError(f"`--config {path}` must be names and values, such as `model: facebook/dinov2-small`.")
    return dict(values)


__all__ = ["TrainSettings", "add_settings", "read_settings"]
