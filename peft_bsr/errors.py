"""Errors and warnings of peft_bsr: one root, so that `except PeftBsrError` catches everything this package raises."""

from __future__ import annotations

from collections.abc import Sequence


class PeftBsrError(Exception):
    """Root of every error that this package raises."""


class ConfigError(PeftBsrError, ValueError):
    """A configuration asks for something impossible. The message lists every problem found, not only the first."""

    @classmethod
    def from_problems(cls, subject: str, problems: Sequence[str]) -> ConfigError:
        """Build the one error that names all `problems` of `subject`.

        Args:
            subject: What was being checked, for example `"BSRConfig"`.
            problems: One sentence a problem: what was asked, what was found, what to do.
        """
        return cls(f"{subject}: " + (problems[0] if len(problems) == 1 else "".join(f"\n  - {p}" for p in problems)))


class UnsupportedModelError(PeftBsrError, ValueError):
    """The model cannot be used exactly; the message says what the probe found. The model was not changed."""


class UnsupportedPeftError(PeftBsrError, ImportError):
    """The installed version of peft lies outside the supported range."""


class MissingDependencyError(PeftBsrError, ImportError):
    """An option needs a package that is not installed; the message names it."""


class AdapterError(PeftBsrError, ValueError):
    """A call on adapters (merge, set, mixed batch) asks for what this method cannot do."""


class FeatureCacheError(PeftBsrError, ValueError):
    """A feature cache does not belong to this model or these samples, is not complete, or has no room."""


class TrainabilityError(PeftBsrError, RuntimeError):
    """What was to train does not; the message names it."""


class AdapterNameWarning(UserWarning):
    """An adapter is called like a module: saving another one beside it would lose weights."""


class ReductionNotMergedWarning(UserWarning):
    """The merged model runs on all tokens: token reduction is not part of the weights."""
