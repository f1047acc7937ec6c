"""Parses the command line, runs one command, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from peft_bsr.errors import (
    AdapterError,
    ConfigError,
    DatasetError,
    HubError,
    PeftBsrError,
    UnsupportedModelError,
    UsageError,
    one_line,
)
from peft_bsr.registration import package_version

COMMANDS = {
    "inspect": "what a model is made of, and which methods it takes",
    "plan": "ways to train that fit into a memory budget, before anything runs",
    "check": "what is in a data set, before anything trains on it",
    "train": "fine-tune, keep an adapter, write a report",
    "evaluate": "accuracy of an adapter on a data set",
    "show": "which patches of images an adapter keeps",
    "export": "one file that runs elsewhere, token reduction included",
    "compare": "methods side by side on a model, measured here",
}
_BAD_INPUT = (AdapterError, ConfigError, DatasetError, HubError, UnsupportedModelError, UsageError)
_EPILOG = """\
examples:
  peft-bsr inspect google/vit-base-patch16-224
  peft-bsr plan google/vit-base-patch16-224 --memory 2GB --batch-size 32
  peft-bsr train --model google/vit-base-patch16-224-in21k --dataset beans --output outputs/beans
  peft-bsr show leaf.jpg --model outputs/beans/adapter

MODEL is an id on the Hub or a folder, of a model or of an adapter.
Exit codes: 0 done, 1 failed, 2 asked for what cannot be.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What was typed behind `peft-bsr`. Default: this process's.

    Returns:
        Exit code: 0 done, 1 failed, 2 asked for what cannot be, 130 interrupted.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        module, args = _parse(typed)
    except ModuleNotFoundError as error:
        return _fail(_missing(error), 1)
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    args.typed = typed
    try:
        if not args.debug:
            warnings.simplefilter("ignore", FutureWarning)  # transformers' and PEFT's, of their own next versions
        # libraries print to stdout as they like; with --json it is for machines
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            out = _output(args)
            result = module.run(args, out)
        if args.json:
            out.write_json(result)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError):
            return _fail(_missing(error), 1)
        named = isinstance(error, (PeftBsrError, OSError))
        message = one_line(error) if named else f"{type(error).__name__}: {one_line(error)}"
        return _fail(message, 2 if _is_bad_input(error) else 1)


def _parse(typed: list[str]) -> tuple[Any, argparse.Namespace]:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    parser = argparse.ArgumentParser(
        prog="peft-bsr",
        description="Memory-efficient fine-tuning of vision transformers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-bsr {package_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in typed if not word.startswith("-")), None)
    module = importlib.import_module(f"peft_bsr.cli.{chosen}") if chosen in COMMANDS else None
    for name, purpose in COMMANDS.items():
        settings: dict[str, Any] = {"help": purpose, "parents": [common]}
        if name == chosen and module is not None:
            settings |= {
                "description": module.__doc__,
                "epilog": module.EXAMPLES,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
            }
        command = subparsers.add_parser(name, **settings)
        if name == chosen and module is not None:
            module.add_arguments(command)
    return module, parser.parse_args(typed)


def _output(args: argparse.Namespace) -> Any:
    from peft_bsr.cli.output import Output  # rich is no dependency of the package

    return Output(args.json, args.debug)


def _is_bad_input(error: Exception) -> bool:
    return isinstance(error, _BAD_INPUT)


def _missing(error: ModuleNotFoundError) -> str:
    return f"the package `{error.name}` is not installed. Run `pip install 'peft-bsr[cli]'`."


def _fail(message: str, code: int) -> int:
    print(f"peft-bsr: {message}", file=sys.stderr)
    return code


__all__ = ["COMMANDS", "main"]
