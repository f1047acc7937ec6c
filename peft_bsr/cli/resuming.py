"""Resuming runs: finding the checkpoint, checking that settings and data match, and storing the state of a run."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path, PurePath
from types import FrameType
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from peft_bsr.cli.settings import TrainSettings
from peft_bsr.cli.values import read_file
from peft_bsr.data import LabelledImages, labels_of, stored
from peft_bsr.data.columns import values_of
from peft_bsr.data.rows import some
from peft_bsr.errors import AdapterFileError, UsageError
from peft_bsr.tuners.base.digests import check_weights_belong
from peft_bsr.tuners.base.source import read_header

Handler = Callable[[int, FrameType | None], object] | int | None
FILE, DATA_FILE = "settings.yaml", "data.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*.bin")
_MAY_CHANGE = {"epochs", "max_steps", "output", "trainer", "device", "workers", "compile", "early_stopping", "keep"}


def take_stored_settings(args: argparse.Namespace) -> None:
    """For `--resume --output OUT` without `--config`, use the settings stored in OUT."""
    if args.resume and args.config is None and args.output and (Path(args.output) / FILE).is_file():
        args.config = Path(args.output) / FILE


def find_checkpoint(settings: TrainSettings, resume: bool) -> str | None:
    """The checkpoint to resume from, or None for a new run. Nothing is written.

    Raises:
        UsageError: If there is no checkpoint to resume, one that a new run would overwrite, or one with other settings.
    """
    folder = Path(settings.output) / "checkpoints"
    found = _last_whole(folder)
    if resume and found is None and _checkpoints(folder):
        raise UsageError(f"`--resume`: no checkpoint in `{folder}` is complete. Give another `--output`.")
    if resume and found is None:
        raise UsageError(f"`--resume`: there is no checkpoint in `{folder}`.")
    if _checkpoints(folder) and not resume:
        raise UsageError(f"`{folder}` has checkpoints. Pass `--resume` to continue, or give another `--output`.")
    stored = Path(settings.output) / FILE
    if found is not None and stored.is_file():
        before, now = asdict(TrainSettings(**_known(read_file(stored)))), asdict(settings)
        if not isinstance(settings.learning_rate, float):  # the default or the result of the sweep in that run
            settings.learning_rate = now["learning_rate"] = before["learning_rate"]
        different = [name for name in now if name not in _MAY_CHANGE and before[name] != now[name]]
        if different:
            pairs = "; ".join(f"{name}: {before[name]!r} there, {now[name]!r} given" for name in different)
            raise UsageError(
                f"`--resume`: the run in `{settings.output}` has other settings ({pairs}). Leave these out "
                "to continue it, or give another `--output`."
            )
    return found


def digest_data(data: LabelledImages) -> dict[str, str]:
    """Names of the labels, and for each split the number of images and a digest of their files and labels.

    Files count by their path below the dataset, others by their name; the images themselves are not read.

    Args:
        data: Images of the run.
    """
    path = Path(data.name).expanduser()
    root = path if path.is_dir() else path.parent
    splits = {split: f"{len(rows)} images, digest {_digest(data, split, root)}" for split, rows in data.splits.items()}
    return {"labels": some(data.labels), **splits}


def check_data(settings: TrainSettings, now: Mapping[str, str]) -> None:
    """Check that a resumed run has the data it began with. A run that stored no digest is not checked.

    Args:
        settings: Settings of the run.
        now: See `digest_data`.

    Raises:
        UsageError: If classes, files, splits or labels have changed.
    """
    path = Path(settings.output) / DATA_FILE
    if not path.is_file():
        return
    before = json.loads(path.read_bytes())
    different = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if different:
        pairs = "; ".join(
            f"{name}: {before.get(name, 'none')} there, {now.get(name, 'none')} now" for name in different
        )
        raise UsageError(
            f"`--resume`: `{settings.dataset}` has changed since the run in `{settings.output}` began ({pairs}). "
            "Restore it to continue the run, or give another `--output`."
        )


def _digest(data: LabelledImages, split: str, root: Path) -> str:
    rows = data.splits[split]
    found = hashlib.blake2b(json.dumps([data.labels, labels_of(rows).tolist()]).encode(), digest_size=8)
    for path in values_of(stored(rows).flatten(), "image.path"):
        file = PurePath(path or "")
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        found.update(f"{name}\0".encode())
    return found.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the latest first."""
    if not folder.is_dir():
        return []
    found = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def _last_whole(folder: Path) -> str | None:
    """The latest complete checkpoint: Trainer writes `trainer_state.json` last."""
    for path in _checkpoints(folder):
        if (path / TRAINER_STATE_NAME).is_file() and _is_whole(path):
            return str(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Whether its weights can be read; weights of our adapters are compared with their digests."""
    files = [path for name in _WEIGHTS for path in checkpoint.glob(name)]
    try:
        for path in (path for path in files if path.suffix == ".safetensors"):
            read_header(path)
        if (checkpoint / CONFIG_NAME).is_file() and (checkpoint / SAFETENSORS_WEIGHTS_NAME).is_file():
            values = json.loads((checkpoint / CONFIG_NAME).read_bytes())
            check_weights_belong(values.get("digests"), checkpoint / SAFETENSORS_WEIGHTS_NAME)
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except (AdapterFileError, OSError, ValueError, AttributeError):
        return False
    return bool(files)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in TrainSettings.__dataclass_fields__}


def check_output(folder: Path) -> None:
    """Check that a folder can be written, before anything is read. Nothing is created.

    Raises:
        UsageError: If it cannot be written.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(
            f"`--output {folder}` cannot be written: `{existing}` is not a writable folder. Give another folder."
        )


class RunCallback(TrainerCallback, ExportableState):
    """Stores settings and data after the checkpoint is loaded, measures training time across resumes, handles Ctrl-C.

    The first Ctrl-C finishes the step and saves a checkpoint; the second stops at once.

    Args:
        settings: Settings of the run.
        data: See `digest_data`. Default None: not stored.

    Attributes:
        seconds_before: Training time before the run was last resumed.
        is_interrupted: Whether Ctrl-C was pressed.
    """

    def __init__(self, settings: TrainSettings, data: Mapping[str, str] | None = None) -> None:
        self.settings, self.data = settings, data
        self.seconds_before = 0.0
        self.is_interrupted = False
        self._begin = time.perf_counter()
        self._handler: Handler = None

    @property
    def seconds(self) -> float:
        """Training time so far, across resumes."""
        return self.seconds_before + time.perf_counter() - self._begin

    def state(self) -> dict[str, dict[str, float]]:
        """State for the checkpoint."""
        return {"args": {}, "attributes": {"seconds_before": self.seconds}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore the training time of the checkpoint, store settings and data, and handle Ctrl-C."""
        self._begin = time.perf_counter()
        stored = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        self.seconds_before = float(stored.get("attributes", {}).get("seconds_before", 0.0))
        if args.should_save:
            output = Path(self.settings.output)
            output.mkdir(parents=True, exist_ok=True)
            self.settings.write(output / FILE)
            if self.data is not None:
                text = json.dumps(self.data, ensure_ascii=False, indent=2)
                (output / DATA_FILE).write_text(text, encoding="utf-8")
        with contextlib.suppress(ValueError):  # not the main thread
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Save and stop if Ctrl-C was pressed."""
        if self.is_interrupted:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore Python's handler of Ctrl-C and add up the training time."""
        self.release()
        self.seconds_before, self._begin = self.seconds, time.perf_counter()

    def release(self) -> None:
        """Restore Python's handler of Ctrl-C."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.release()  # a second one stops at once
        self.is_interrupted = True


class EarlyStopping(EarlyStoppingCallback):
    """Trainer's callback, which also goes on counting where the checkpoint of a resumed run stopped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore the count, if the run before had one: Trainer needs its place in the state to save it."""
        super().on_train_begin(args, state, control, **kwargs)
        before = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = before["attributes"]["early_stopping_patience_counter"]


__all__ = [
    "DATA_FILE",
    "FILE",
    "EarlyStopping",
    "RunCallback",
    "check_data",
    "check_output",
    "digest_data",
    "find_checkpoint",
    "take_stored_settings",
]
