"""Checks of settings, one sentence per problem. Sizes have upper limits, because a file may contain any value."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

LARGEST_SIZE = 2**16
"""Largest rank, bottleneck, multiple, and number of queries or experts."""
MOST_CLASSES = 2**18
"""Largest number of classes of a head; ImageNet-21k has 21 843."""
LARGEST_NUMBER = 1e6
"""Largest scale or weight."""


@dataclass(frozen=True)
class Within:
    """A range of numbers.

    Attributes:
        words: Description for messages, after "must be a number".
        holds: Whether a number is in the range; False for NaN.
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


def is_whole(value: object, low: float = float("-inf"), high: float = float("inf")) -> bool:
    """Whether the value is an integer from `low` to `high`. Booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, within: Within | None = None) -> bool:
    """Whether the value is a number, in the range `within` if it is given. Booleans are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return within is None or within.holds(value)


def check_whole(settings: object, *names: str, high: int = LARGEST_SIZE, instead: str = "") -> list[str]:
    """Problems of fields that must be integers from 1 to `high`. `instead` names other allowed values."""
    return [
        f"`{name}={getattr(settings, name)!r}` must be an integer from 1 to {high}{instead}."
        for name in names
        if not is_whole(getattr(settings, name), 1, high)
    ]


def check_numbers(settings: object, *names: str, within: Within, instead: str = "") -> list[str]:
    """Problems of fields that must be numbers in a range. `instead` names other allowed values."""
    return [
        f"`{name}={getattr(settings, name)!r}` must be a number {within.words}{instead}."
        for name in names
        if not is_number(getattr(settings, name), within)
    ]


def check_flags(settings: object, *names: str, instead: str = "True or False") -> list[str]:
    """Problems of fields that must be True or False."""
    found = {name: getattr(settings, name) for name in names}
    return [f"`{n}={value!r}` must be {instead}." for n, value in found.items() if not isinstance(value, bool)]


def check_choice(settings: object, name: str, choices: Collection[str]) -> list[str]:
    """The problem of a field that must be one of `choices`, in a list."""
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
