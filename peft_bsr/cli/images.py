"""DATA on the command line: its options, and how what was found in it is said."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from dataclasses import replace
from typing import Any

from datasets import Dataset

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

SIZE_HELP = "pixels of a side (default: what the model's own processor makes)"
DATA_HELP = "digits (default), a folder by class, a .csv, .jsonl or .parquet file, or a Hub id"


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Which columns of a table or a dataset are meant."""
    parser.add_argument("--image-column", metavar="NAME", help="column of images or paths (default: the one there is)")
    parser.add_argument(
        "--label-column", metavar="NAME", help="of classes, or several: a,b,c (default: the one there is)"
    )


def add_task(parser: argparse.ArgumentParser) -> None:
    """What the labels are."""
    words = "default: what lists, texts with a | and fractions in the labels say; whole numbers are classes"
    parser.add_argument("--task", choices=list(TASKS), help=words)


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """What is put aside where a split is missing, and what is done about bad files."""
    parser.add_argument("--test-size", type=float, help="share or number of training images, 0 for none (default 0.2)")
    parser.add_argument("--validation-size", type=float, help="the same of those left (default 0.1)")
    parser.add_argument("--skip-bad", action="store_true", default=None, help="go on without undecodable images")


def add_predicting(parser: argparse.ArgumentParser) -> None:
    """How a model is run over images."""
    parser.add_argument("--image-size", type=int, help="pixels of a side (default: those it was trained at)")
    parser.add_argument("--base", help="base model, where the adapter does not name one that can be read")
    parser.add_argument("--batch-size", type=int, default=32, help="default 32")
    parser.add_argument("--device", help="cpu, cuda or mps (default: what there is)")
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0 on a CPU, else 4)")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Which images of DATA a model is scored on, and how it is run over them."""
    parser.add_argument("--split", help="train, validation or test (default: test, or without one all images)")
    add_columns(parser)
    add_sizes(parser)
    add_predicting(parser)


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers that are too small, before anything is read.

    Args:
        args: What was typed.
        least: Option -> its smallest value.

    Raises:
        UsageError: Naming the first of them.
    """
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UsageError(f"`--{name.replace('_', '-')} {given}` must be at least {value}.")


def check_task(settings: Any, problem_type: ProblemType) -> None:
    """Refuse what does not go with a regression, before images are read.

    Args:
        settings: `TrainSettings`, or what has the same names.
        problem_type: Asked for, or found in the labels.

    Raises:
        UsageError: Naming it.
    """
    given = [f"--{name.replace('_', '-')}" for name in ("class_weights", "label_smoothing") if vars(settings).get(name)]
    given += ["--augment strong"] * (vars(settings).get("augment") == "strong")
    if problem_type == REGRESSION and given:
        advice = "Use `--augment light`: it mixes no images." if "strong" in given[0] else "Leave it out."
        raise UsageError(f"`{given[0]}` is for classes, but the labels are values (regression). {advice}")


def read_training_data(settings: Any, out: Output, at_most: int | None = None) -> LabelledImages:
    """The splits of a training run, every image decoded once; what is in them is said.

    Args:
        settings: `TrainSettings`, or what has the same names.
        out: The screen.
        at_most: Images of train and validation, without a test split: for a short run. Default None: all of them.

    Raises:
        DatasetError: If it cannot be trained on, or if images cannot be decoded.
    """
    columns = {"image_column": settings.image_column, "label_column": settings.label_column}
    data = load_images(settings.dataset, **columns, problem_type=TASKS.get(settings.task))
    check_task(settings, data.problem_type)
    data = put_aside(data, settings.test_size, settings.validation_size)
    if at_most is not None:
        data = draw_for_trial(data, at_most)
    return _checked(data, out, settings.skip_bad)


def read_scored_data(args: argparse.Namespace, predictor: Predictor, out: Output) -> tuple[str, Dataset]:
    """The name and the images of the split to score; what is in it is said.

    Args:
        args: With `--dataset` and the options of `add_scoring`.
        predictor: The model.
        out: The screen.

    Raises:
        DatasetError: If there is no such split, or if it has classes the model does not know.
    """
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    data = load_images(args.dataset, **columns, problem_type=predictor.problem_type, labels=predictor.labels)
    split, rows, notes = choose(data, args.split, args.test_size, args.validation_size)
    return split, _checked(replace(data, splits={split: rows}, notes=data.notes + notes), out, args.skip_bad).splits[
        split
    ]


def read_processor(source: str, out: Output, **settings: Any) -> Any:
    """See `peft_bsr.data.load_processor`; its warnings are notes.

    Args:
        source: Folder or Hub id of the model.
        out: The screen.
        settings: Further arguments.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        processor = load_processor(source, **settings)
    for warning in said:
        out.note(str(warning.message))
    return processor


def default_size(source: str) -> int | None:
    """Pixels of a side that the model's own processor makes, as `train` takes them; None where it does not say.

    Args:
        source: Folder or Hub id of the model.
    """
    with warnings.catch_warnings(), contextlib.suppress(DatasetError):
        warnings.simplefilter("ignore", ProcessorWarning)  # mean and std do not count here
        height, width = size_of(load_processor(source))
        return height if height == width else None
    return None


def say_findings(report: DataReport, out: Output) -> None:
    """Notes and findings, one line each."""
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
