"""What settings are asked, one sentence each, and their upper ends: a file from elsewhere may ask for anything."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

LARGEST_SIZE = 2**16
"""Of ranks, bottlenecks, queries, experts and multiples."""
MOST_CLASSES = 2**18
"""Outputs of a head; ImageNet-21k has 21 843."""
LARGEST_NUMBER = 1e6
"""Of scales and weights."""


@dataclass(frozen=True)
class Within:
    """Numbers that a setting may have.

    Attributes:
        words: After "must be a number".
        holds: Whether a number is one of them; false for NaN.
    """

    words: str
    holds: Callable[[float], bool]


POSITIVE = Within(f"above 0, {LARGEST_NUMBER:.0e} at most", lambda number: 0 < number <= LARGEST_NUMBER)
NOT_NEGATIVE = Within(f"from 0 to {LARGEST_NUMBER:.0e}", lambda number: 0 <= number <= LARGEST_NUMBER)
SHARE = Within("in (0, 1], 1.0 = all", lambda number: 0 < number <= 1)
RATE = Within("in [0, 1)", lambda number: 0 <= number < 1)
EITHER_SIGN = Within(
    f"between -{LARGEST_NUMBER:.0e} and {LARGEST_NUMBER:.0e}", lambda number: abs(number) <= LARGEST_NUMBER
)


def is_whole(value: Any, low: float = float("-inf"), high: float = float("inf")) -> bool:
    """Whether it is a whole number, `low` to `high`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any, within: Within | None = None) -> bool:
    """Whether it is a number, `within` that; True and False are none."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and (within is None or within.holds(value))


def check_whole(settings: Any, *names: str, high: int = LARGEST_SIZE, instead: str = "") -> list[str]:
    """Fields that are no whole number from 1 to `high`; `instead` names what else they may be."""
    return [
        f"`{name}={getattr(settings, name)!r}` must be an integer from 1 to {high}{instead}."
        for name in names
        if not is_whole(getattr(settings, name), 1, high)
    ]


def check_numbers(settings: Any, *names: str, within: Within, instead: str = "") -> list[str]:
    """Fields that are no number `within` that; `instead` names what else they may be."""
    return [
        f"`{name}={getattr(settings, name)!r}` must be a number {within.words}{instead}."
        for name in names
        if not is_number(getattr(settings, name), within)
    ]


def check_flags(settings: Any, *names: str, instead: str = "True or False") -> list[str]:
    """Fields that are neither True nor False."""
    found = {name: getattr(settings, name) for name in names}
    return [f"`{n}={value!r}` must be {instead}." for n, value in found.items() if not isinstance(value, bool)]


def check_choice(settings: Any, name: str, choices: Collection[str]) -> list[str]:
    """A field that is none of `choices`."""
    value = getattr(settings, name)
    return [] if value in choices else [f"`{name}={value!r}` is unknown. Use one of {', '.join(map(repr, choices))}."]


__all__ = [
    "EITHER_SIGN",
    "LARGEST_NUMBER",
    "LARGEST_SIZE",
    "MOST_CLASSES",
    "NOT_NEGATIVE",
    "POSITIVE",
    "RATE",
    "SHARE",
    "Within",
    "check_choice",
    "check_flags",
    "check_numbers",
    "check_whole",
    "is_number",
    "is_whole",
]
