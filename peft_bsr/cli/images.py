"""Options for images on the command line, and reading them with notes about the data."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import BaseImageProcessor

from peft_bsr.cli.output import Output
from peft_bsr.data import (
    DataReport,
    LabelledImages,
    check_images,
    choose,
    draw_for_trial,
    load_images,
    load_processor,
    put_aside,
    refuse_bad,
    size_of,
)
from peft_bsr.errors import DatasetError, ProcessorWarning, UsageError
from peft_bsr.prediction import Predictor
from peft_bsr.problem_type import REGRESSION, TASKS, ProblemType

if TYPE_CHECKING:
    from peft_bsr.cli.settings import TrainSettings

SIZE_HELP = "side length in pixels (default: that of the model's own processor)"
DATA_HELP = "digits (default), a folder by class, a .csv, .jsonl or .parquet file, or a Hub id"


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose columns of a table or a dataset."""
    parser.add_argument("--image-column", metavar="NAME", help="column of images or paths (default: the only one)")
    parser.add_argument(
        "--label-column", metavar="NAME", help="column of classes, or several: a,b,c (default: the only one)"
    )


def add_task(parser: argparse.ArgumentParser) -> None:
    """Add the option for the type of the labels."""
    words = "default: from the labels (lists, strings with |, fractions); integers are classes"
    parser.add_argument("--task", choices=list(TASKS), help=words)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """Add the options for the sizes of missing splits, and for images that cannot be decoded."""
    parser.add_argument("--test-size", type=float, help="share or number of images, 0 for none (default 0.2)")
    parser.add_argument("--validation-size", type=float, help="the same, of the remaining images (default 0.1)")
    parser.add_argument("--skip-bad", action="store_true", default=None, help="skip images that cannot be decoded")


def add_predicting(parser: argparse.ArgumentParser) -> None:
    """Add the options for running a model on images."""
    parser.add_argument("--image-size", type=int, help="side length in pixels (default: as in training)")
    parser.add_argument("--base", help="base model, if the one that the adapter names cannot be read")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best available)")
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0 on a CPU, else 4)")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the options for evaluating a model on a dataset."""
    parser.add_argument("--split", help="train, validation or test (default: test, or all images if there is none)")
    add_columns(parser)
    add_sizes(parser)
    add_predicting(parser)


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Check that options are not too small, before anything is read.

    Args:
        args: Parsed arguments.
        least: Option -> its smallest value.

    Raises:
        UsageError: If an option is too small.
    """
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UsageError(f"`--{name.replace('_', '-')} {given}` must be at least {value}.")


def check_task(settings: TrainSettings | argparse.Namespace, problem_type: ProblemType) -> None:
    """Check that no setting contradicts a regression, before images are read.

    Args:
        settings: `TrainSettings`, or a namespace with the same names.
        problem_type: Requested problem type, or the one of the labels.

    Raises:
        UsageError: If a setting is only for classes.
    """
    given = [f"--{name.replace('_', '-')}" for name in ("class_weights", "label_smoothing") if vars(settings).get(name)]
    given += ["--augment strong"] * (vars(settings).get("augment") == "strong")
    if problem_type == REGRESSION and given:
        advice = "Use `--augment light`: it mixes no images." if "strong" in given[0] else "Leave it out."
        raise UsageError(f"`{given[0]}` is for classes, but the labels are values (regression). {advice}")


def read_training_data(
    settings: TrainSettings | argparse.Namespace, out: Output, at_most: int | None = None
) -> LabelledImages:
    """Read the splits of a training run, decode every image once, and print what is in them.

    Args:
        settings: `TrainSettings`, or a namespace with the same names.
        out: Output of the command.
        at_most: Maximum number of images of train and validation, without a test split, for a short run. Default None:
            all images.

    Raises:
        DatasetError: If the dataset cannot be used for training, or if images cannot be decoded.
    """
    data = load_images(
        settings.dataset,
        image_column=settings.image_column,
        label_column=settings.label_column,
        problem_type=TASKS.get(settings.task or ""),
    )
    check_task(settings, data.problem_type)
    data = put_aside(data, settings.test_size, settings.validation_size)
    if at_most is not None:
        data = draw_for_trial(data, at_most)
    return _checked(data, out, settings.skip_bad)


def read_scored_data(args: argparse.Namespace, predictor: Predictor, out: Output) -> tuple[str, Dataset]:
    """Read the split to evaluate, and print what is in it.

    Args:
        args: Parsed arguments with `--dataset` and the options of `add_scoring`.
        predictor: The model.
        out: Output of the command.

    Returns:
        Name and images of the split.

    Raises:
        DatasetError: If there is no such split, or if it has classes that the model does not know.
    """
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_images(args.dataset, **columns, problem_type=predictor.problem_type, labels=predictor.labels)
    split, rows, notes = choose(data, args.split, args.test_size, args.validation_size)
    return split, _checked(replace(data, splits={split: rows}, notes=data.notes + notes), out, args.skip_bad).splits[
        split
    ]


def read_processor(
    source: str,
    out: Output,
    *,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> BaseImageProcessor:
    """Call `peft_bsr.data.load_processor`, and print its warnings as notes.

    Args:
        source: Folder or Hub id of the model.
        out: Output of the command.
        image_size: See `load_processor`.
        mean: See `load_processor`.
        std: See `load_processor`.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        processor: BaseImageProcessor = load_processor(source, image_size=image_size, mean=mean, std=std)
    for warning in said:
        out.note(str(warning.message))
    return processor


def default_size(source: str) -> int | None:
    """Image size of the model's own processor, which `train` uses by default; None if it has no square size.

    Args:
        source: Folder or Hub id of the model.
    """
    with warnings.catch_warnings(), contextlib.suppress(DatasetError):
        warnings.simplefilter("ignore", ProcessorWarning)  # mean and std are not used here
        height, width = size_of(load_processor(source))
        return height if height == width else None
    return None


def say_findings(report: DataReport, out: Output) -> None:
    """Print notes and findings, one line each."""
    for text in [*report.notes, *report.findings()]:
        out.note(text)


def _checked(data: LabelledImages, out: Output, skip_bad: bool | None) -> LabelledImages:
    out.note(data.describe())
    report, clean = check_images(data, progress=not out.is_json)
    if not report.bad or skip_bad:
        say_findings(report, out)
    refuse_bad(report, bool(skip_bad))
    return clean


__all__ = [
    "DATA_HELP",
    "SIZE_HELP",
    "add_columns",
    "add_predicting",
    "add_scoring",
    "add_sizes",
    "add_task",
    "check_at_least",
    "check_task",
    "default_size",
    "read_processor",
    "read_scored_data",
    "read_training_data",
    "say_findings",
]
