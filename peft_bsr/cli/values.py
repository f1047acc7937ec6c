"""Values as they are typed: NAME=VALUE on the command line, and files of YAML."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from peft_bsr.errors import UsageError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in what people type: `no` and `off` are words, `1e-3` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """What a text of YAML says.

    Raises:
        yaml.YAMLError: If it is none.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


def read_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """`["keep_rate=0.7", "trainable_blocks=last:3"]` as names and values; a value is JSON, or else YAML.

    Raises:
        UsageError: If there is no `=`, or a value is not understood.
    """
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"`{pair}` must be NAME=VALUE, such as keep_rate=0.7.")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            try:
                found[name] = load_yaml(text)
            except yaml.YAMLError as error:
                raise UsageError(f"`{pair}` must be NAME=VALUE, with a value that is JSON or YAML.") from error
    return found


def read_file(path: Path) -> dict[str, Any]:
    """Names and values of a YAML file.

    Raises:
        UsageError: If it cannot be read, or says something else.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`--config {path}` cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"`--config {path}` is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise UsageError(f"`--config {path}` must be names and values, such as `model: facebook/dinov2-small`.")
    return dict(values)


def trainer_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `TrainingArguments`, each read as the type that it has there: `no` is a word for `save_strategy`.

    Args:
        values: Known names and what was typed.

    Raises:
        UsageError: If a value does not fit its field.
    """
    parser = HfArgumentParser(TrainingArguments, exit_on_error=False)
    found = dict(values)
    for name, value in values.items():
        if isinstance(value, str):
            try:
                found[name] = getattr(argparse.ArgumentParser.parse_args(parser, [f"--{name}={value}"]), name)
            except (argparse.ArgumentError, argparse.ArgumentTypeError, ValueError) as error:
                reason = (str(error).partition(": ")[2] or str(error)).rstrip(".")
                raise UsageError(f"`--trainer {name}={value}`: {reason}.") from error
    return found


__all__ = ["load_yaml", "read_file", "read_pairs", "trainer_values"]
