"""Default learning rates from the project's benchmark, for the command line, plans and documentation.

Each is the best of a sweep in steps of half a decade, for AdamW with a cosine schedule and 10 % warm-up, see
docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_bsr.tuners import METHODS

WARMUP_SHARE = 0.1
"""Share of all optimizer steps in which the learning rate rises from 0 (`TrainingArguments(warmup_steps=0.1)`)."""

LEARNING_RATES: dict[tuple[str, str | None], float] = {
    **{(info.name, way): rate for info in METHODS.values() for way, rate in info.learning_rates.items()},
    ("lora", None): 3e-3,
    ("full", None): 3e-4,
    ("linear", None): 1e-2,
}
"""(method, its option `trainable`) -> peak learning rate."""


def default_learning_rate(method: str, options: Mapping[str, Any] | None = None) -> float:
    """The default learning rate of a method.

    Args:
        method: `"bsr"`, `"alast"`, `"synqt"`, `"losa"`, `"lora"`, `"full"` (fine-tuning) or `"linear"` (the
            classifier alone).
        options: Fields of the method's configuration, which determine `trainable`. Default None: its defaults.

    Raises:
        KeyError: If there is no such method.
        ConfigError: If the configuration is invalid.

    Examples:
        >>> default_learning_rate("bsr"), default_learning_rate("bsr", {"trainable": "lora"})
        (0.001, 0.003)
    """
    config = METHODS[method].config(**(options or {})) if method in METHODS else None
    return LEARNING_RATES.get((method, getattr(config, "trainable", None))) or LEARNING_RATES[method, None]


__all__ = ["LEARNING_RATES", "WARMUP_SHARE", "default_learning_rate"]
