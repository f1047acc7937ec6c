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
        """Build the one error that names all `problems` of `subject`.

        Args:
            subject: What was being checked, for example `"BSRConfig"`.
            problems: One sentence a problem: what was asked, what was found, what to do.
        """
        return cls(f"{subject}: " + (problems[0] if len(problems) == 1 else "".join(f"\n  - {p}" for p in problems)))


def one_line(error: BaseException) -> str:
    """All that `error` says, without line breaks."""
    return " ".join(str(error).split())


_UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EPERM, errno.EROFS}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors tells it


def unwritable(error: BaseException) -> str | None:
    """Why a folder takes no file, or None where the error is of something else.

    Args:
        error: Python's, torch's or safetensors'.
    """
    number = getattr(error, "errno", None)
    if type(error).__name__ == "SafetensorError" and (match := _OS_ERROR.search(str(error))):
        number = int(match[1])
    if number in _UNWRITABLE:
        return one_line(error)
    if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # torch.save tells no more
        return "the disk is full, or the folder is not writable"
    return None


def headline(error: BaseException) -> str:
    """The class of another library's error and its first line, 200 characters at most, to be told within ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class ConfigError(PeftBsrError, ValueError):
    """A configuration asks for something impossible. The message lists every problem found, not only the first."""


class UnsupportedModelError(PeftBsrError, ValueError):
    """The model cannot be used exactly; the message says what the probe found. The model was not changed."""


class UnsupportedPeftError(PeftBsrError, ImportError):
    """The installed version of peft lies outside the supported range."""


class MissingDependencyError(PeftBsrError, ImportError):
    """An option needs a package that is not installed; the message names it."""


class AdapterError(PeftBsrError, ValueError):
    """A call on adapters (merge, set, mixed batch) asks for what this method cannot do."""


class AdapterFileError(PeftBsrError, ValueError):
    """A file of an adapter is missing, damaged, pickled, or of something else; nothing of it was loaded."""


class InputError(PeftBsrError, ValueError):
    """What a model or a picture was called with is not what it takes."""


class ForwardError(PeftBsrError, RuntimeError, ValueError):
    """Part of a model was called outside of the model's forward, or what it was given does not belong together."""


class FeatureCacheError(PeftBsrError, ValueError):
    """A feature cache does not belong to this model or these samples, is not complete, or has no room."""


class DatasetError(PeftBsrError, ValueError):
    """A dataset does not exist, or has no labelled images."""


class HubError(PeftBsrError, ValueError):
    """A model, an adapter or its base model cannot be found, read, or used for this; the message says why."""


class ExportError(PeftBsrError, ValueError):
    """A model cannot be written in a format, a package for it is missing, or what was written computes otherwise."""


class TrainabilityError(PeftBsrError, RuntimeError):
    """What was to train does not; the message names it."""


class NonFiniteLossError(PeftBsrError, RuntimeError):
    """A training loss is NaN or infinite; the message names the step and the file that keeps its batch."""


class UsageError(PeftBsrError, ValueError):
    """The command line was asked for what cannot be; it ends with exit code 2."""


class PeftBsrWarning(UserWarning):
    """Root of every warning that this package gives."""


class AdapterNameWarning(PeftBsrWarning):
    """An adapter is called like a module: saving another one beside it would lose weights."""


class OtherWeightsWarning(PeftBsrWarning):
    """An adapter is loaded on a base model of the right architecture, but of other weights."""


class AdapterSwitchedWarning(PeftBsrWarning):
    """The active adapter was deleted, and another one is active now."""


class ReductionNotMergedWarning(PeftBsrWarning):
    """The merged model runs on all tokens: token reduction is not part of the weights."""


class ProcessorWarning(PeftBsrWarning):
    """A model has no image processor, and the default one of its type was taken."""


class UnreadableImageWarning(PeftBsrWarning):
    """Some of the images to predict cannot be read; the message counts and names them."""


class LeanBlockWarning(PeftBsrWarning):
    """A block that was planned lean runs stock in training, and keeps more for backward."""


class MemoryBudgetWarning(PeftBsrWarning):
    """Random operations are compiled with a memory budget below 1: torch gives wrong gradients then."""
