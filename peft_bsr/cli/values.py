"""Parses values from NAME=VALUE or a YAML file by the types of their fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_type_hints

import yaml

from peft_bsr.errors import UsageError

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Loader(yaml.SafeLoader):
    """YAML 1.2: only `true` and `false` are booleans, so that `eval_strategy: no` and `lean: off` are strings."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def read_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """Split `["keep_rate=0.7", "trainable_blocks=last:3"]` into names and values as strings.

    Raises:
        UsageError: If a pair has no `=`.
    """
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"`{pair}` must be NAME=VALUE, such as keep_rate=0.7.")
        found[name] = text
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Names and values of a YAML file.

    Raises:
        UsageError: If it cannot be read, or is not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"`--config {path}` cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"`--config {path}` is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        json.dumps(values, default=str, skipkeys=True)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`--config {path}` has a value that contains itself, through a YAML anchor.") from error
    if not isinstance(values, Mapping):
        raise UsageError(f"`--config {path}` must be names and values, such as `model: facebook/dinov2-small`.")
    return dict(values)


def read_fields(values: Mapping[str, Any], settings: type[Any]) -> dict[str, Any]:
    """Parse strings by the types of their fields; other values and unknown names are not changed.

    Args:
        values: Names and values.
        settings: Dataclass with the fields.

    Raises:
        UsageError: If a string cannot be parsed as the type of its field.
    """
    kinds = get_type_hints(settings)
    is_read = {name: isinstance(value, str) and name in kinds for name, value in values.items()}
    return {name: _read(name, value, kinds[name]) if is_read[name] else value for name, value in values.items()}


def read_bool(name: str, value: object) -> bool:
    """True or false, also as a word: a YAML file gives `no` as a string.

    Args:
        name: Name of the field, for the error.
        value: A bool, or one of true, yes, on, false, no, off in any case.

    Raises:
        UsageError: If it is anything else.
    """
    found = _BOOLS.get(str(value).lower())
    if found is None:
        raise UsageError(f"`{name}: {value}` must be true or false.")
    return found


def _read(name: str, text: str, kind: object) -> object:
    kinds = set(get_args(kind) or (kind,)) - {NoneType}
    if text in ("null", "~") and kinds != {str}:
        return None
    if bool in kinds and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if all(isinstance(k, type) and issubclass(k, (str, Enum)) for k in kinds):
        return json.loads(text) if re.fullmatch(r'"[^"\\]*"', text) else text
    if kinds <= {int, float}:
        return _number(name, text, is_whole=float not in kinds)
    try:
        return json.loads(text)  # YAML reads 1e-3 as a string
    except json.JSONDecodeError:
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise UsageError(f"`{name}={text}` must be NAME=VALUE, with a value that is JSON or YAML.") from error


def _number(name: str, text: str, is_whole: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"`{name}={text}` must be a number.") from None
    if is_whole and not value.is_integer():
        raise UsageError(f"`{name}={text}` must be an integer.")
    return int(value) if is_whole else value


__all__ = ["Loader", "read_bool", "read_fields", "read_file", "read_pairs"]
