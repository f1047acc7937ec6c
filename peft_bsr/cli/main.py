"""Parses the command line, runs one command, and converts errors to one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from peft_bsr.errors import (
    AdapterError,
    AdapterFileError,
    ConfigError,
    DatasetError,
    HubError,
    PeftBsrError,
    UnsupportedModelError,
    UsageError,
    one_line,
    unwritable,
)
from peft_bsr_cli import command_of, make_parser

if TYPE_CHECKING:
    from peft_bsr.cli.output import Output

_BAD_INPUT = (
    AdapterError,
    AdapterFileError,
    ConfigError,
    DatasetError,
    HubError,
    UnsupportedModelError,
    UsageError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Arguments after `peft-bsr`. Default None: those of this process.

    Returns:
        Exit code: 0 success, 1 failure, 2 invalid input, 130 interrupted.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        module, args = _parse(typed)
    except ModuleNotFoundError as error:
        return _fail(_missing(error), 1)
    except SystemExit as stop:  # argparse has printed the reason
        return int(stop.code or 0)
    args.typed = typed
    try:
        if not args.debug:
            warnings.simplefilter("ignore", FutureWarning)  # of transformers and PEFT, about their next versions
        # libraries may print to stdout; with --json it must be JSON only
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            out = _output(args)
            result = module.run(args, out)
        if args.json:
            out.write_json(result)
        return int(out.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError):
            return _fail(_missing(error), 1)
        named = isinstance(error, (PeftBsrError, OSError))
        message = one_line(error) if named else f"{type(error).__name__}: {one_line(error)}"
        if not isinstance(error, PeftBsrError) and (why := unwritable(error)):
            return _fail(f"cannot write: {why}. Free disk space, or give a folder that is writable.", 2)
        return _fail(message, 2 if isinstance(error, _BAD_INPUT) else 1)


def _parse(typed: list[str]) -> tuple[ModuleType, argparse.Namespace]:
    chosen = command_of(typed)
    module = importlib.import_module(f"peft_bsr.cli.{chosen.replace('-', '_')}") if chosen else None
    args = make_parser(chosen, module).parse_args(typed)  # exits without a command
    assert module is not None
    return module, args


def _output(args: argparse.Namespace) -> Output:
    from peft_bsr.cli.output import Output  # rich is not a dependency of the package

    return Output(args.json, args.debug)


def _missing(error: ModuleNotFoundError) -> str:
    return f"the package `{error.name}` is not installed. Run `pip install 'peft-bsr[cli]'`."


def _fail(message: str, code: int) -> int:
    print(f"peft-bsr: {message}", file=sys.stderr)
    return code


__all__ = ["main"]
