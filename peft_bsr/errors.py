"""Errors and warnings of peft_bsr: one root, so that `except PeftBsrError` catches everything this package raises."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class PeftBsrError(Exception):
    """Root of every error that this package raises."""

    @classmethod
    def from_problems(cls, subject: str, problems: Sequence[str]) -> Self:
        """One error with all `problems` of `subject`.

        Args:
            subject: What was checked, for example `"BSRConfig"`.
            problems: One sentence per problem: what was given, what was found, what to do.
        """
        return cls(f"{subject}: " + (problems[0] if len(problems) == 1 else "".join(f"\n  - {p}" for p in problems)))


def one_line(error: BaseException) -> str:
    """The message of `error` in one line."""
    return " ".join(str(error).split())


_UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EPERM, errno.EROFS}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # format of safetensors' messages


def unwritable(error: BaseException) -> str | None:
    """Why a file cannot be written, or None if the error has another cause.

    Args:
        error: An error of Python, torch or safetensors.
    """
    number = getattr(error, "errno", None)
    if type(error).__name__ == "SafetensorError" and (match := _OS_ERROR.search(str(error))):
        number = int(match[1])
    if number in _UNWRITABLE:
        return one_line(error)
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # torch.save gives no reason
        return "the disk is full, or the folder is not writable"
    return None


def headline(error: BaseException) -> str:
    """Class and first line, at most 200 characters, of another library's error, for use in our messages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class ConfigError(PeftBsrError, ValueError):
    """A configuration is invalid. The message lists all problems, not only the first."""


class UnsupportedModelError(PeftBsrError, ValueError):
    """The model is not supported; the message says what the probe found. The model was not changed."""


class UnsupportedPeftError(PeftBsrError, ImportError):
    """The installed version of peft is outside the supported range."""


class MissingDependencyError(PeftBsrError, ImportError):
    """An option needs a package that is not installed; the message names it."""


class AdapterError(PeftBsrError, ValueError):
    """A call on adapters (merge, set, mixed batch) is not supported by the method."""


class AdapterFileError(PeftBsrError, ValueError):
    """A file of an adapter is missing, damaged, pickled, or belongs to something else; nothing of it was loaded."""


class InputError(PeftBsrError, ValueError):
    """The inputs of a model or of a picture are invalid."""


class ForwardError(PeftBsrError, RuntimeError, ValueError):
    """Part of a model was called outside of the model's forward, or with inputs that do not fit together."""


class FeatureCacheError(PeftBsrError, ValueError):
    """A feature cache belongs to another model or other samples, is incomplete, or has too little disk space."""


class DatasetError(PeftBsrError, ValueError):
    """A dataset does not exist, or has no labelled images."""


class HubError(PeftBsrError, ValueError):
    """A model, an adapter or its base model cannot be found, read, or used for this; the message says why."""


class ExportError(PeftBsrError, ValueError):
    """A model cannot be exported, a package is missing, or the outputs of the exported file differ."""


class TrainabilityError(PeftBsrError, RuntimeError):
    """Parameters that should train do not; the message names them."""


class NonFiniteLossError(PeftBsrError, RuntimeError):
    """A training loss is NaN or infinite; the message names the step and the file with its batch."""


class UsageError(PeftBsrError, ValueError):
    """Invalid input of the command line; it ends with exit code 2."""


class PeftBsrWarning(UserWarning):
    """Root of every warning that this package gives."""


class AdapterNameWarning(PeftBsrWarning):
    """An adapter has the name of a module: saving another adapter next to it would lose weights."""


class OtherWeightsWarning(PeftBsrWarning):
    """An adapter is loaded on a base model with the right architecture, but other weights."""


class AdapterSwitchedWarning(PeftBsrWarning):
    """The active adapter was deleted, and another one is active now."""


class ReductionNotMergedWarning(PeftBsrWarning):
    """The merged model runs on all tokens: token reduction is not part of the weights."""


class ProcessorWarning(PeftBsrWarning):
    """A model has no image processor, and the default one of its type is used."""


class UnreadableImageWarning(PeftBsrWarning):
    """Some images to predict cannot be read; the message gives their number and names."""


class RoundedUpdatesWarning(PeftBsrWarning):
    """More than half of the optimizer's changes to a module in bfloat16 or float16 are rounded away."""


class LeanBlockWarning(PeftBsrWarning):
    """A block that was planned lean runs stock in training, and keeps more for backward."""


class MemoryBudgetWarning(PeftBsrWarning):
    """Random operations are compiled with a memory budget below 1, with which torch gives wrong gradients."""
