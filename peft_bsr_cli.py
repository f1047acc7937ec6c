"""The console script `peft-bsr`: answers `--help` and `--version` without importing torch.

A module outside of the package, because `import peft_bsr` imports PEFT (and so torch) to register the methods there.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

COMMANDS = {
    "inspect": "what a model is made of, and which methods it takes",
    "plan": "ways to train that fit into a memory budget, before anything runs",
    "check": "what is in a dataset, before anything trains on it",
    "check-adapter": "what is in an adapter's files, and whether they are complete",
    "train": "fine-tune, keep an adapter, write a report",
    "evaluate": "accuracy of an adapter, a model or an ONNX file on a dataset",
    "predict": "classes of images, as CSV",
    "show": "which patches of images an adapter keeps",
    "export": "one file that runs elsewhere, token reduction included",
    "merge": "merge an adapter into a plain transformers model, for use without this package",
    "compare": "methods side by side on a model, measured here",
    "app": "planner, kept tokens and benchmark in a browser",
}
_EPILOG = """\
examples:
  peft-bsr inspect google/vit-base-patch16-224
  peft-bsr plan google/vit-base-patch16-224 --memory 2GB --batch-size 32
  peft-bsr train --model google/vit-base-patch16-224-in21k --dataset beans --output outputs/beans
  peft-bsr show leaf.jpg --model outputs/beans/adapter

MODEL is an id on the Hub or a folder, of a model or of an adapter.
Exit codes: 0 success, 1 failure, 2 invalid input.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Its module, and torch with it, is imported only if a command is given.

    Args:
        arguments: Arguments after `peft-bsr`. Default None: those of this process.

    Returns:
        Exit code: 0 success, 1 failure, 2 invalid input, 130 interrupted.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if command_of(typed) is None:
        try:
            make_parser().parse_args(typed)  # prints help, the version or an error, and exits
        except SystemExit as stop:
            return int(stop.code or 0)
    for name in ("torchao", "torch.utils._pytree"):  # hide their warnings at import
        logging.getLogger(name).setLevel(logging.ERROR)
    from peft_bsr.cli.main import main as run

    return run(typed)


def command_of(typed: Sequence[str]) -> str | None:
    """The given command, or None if there is no command of that name."""
    word = next((word for word in typed if not word.startswith("-")), None)
    return word if word in COMMANDS else None


def make_parser(chosen: str | None = None, module: ModuleType | None = None) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        chosen: Command whose options are added. Default None: no command.
        module: Module of the command, with `EXAMPLES` and `add_arguments(parser)`.
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    common.add_argument("--debug", action="store_true", help="show where an error came from")
    parser = argparse.ArgumentParser(
        prog="peft-bsr",
        description="Memory-efficient fine-tuning of vision transformers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-bsr {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    return parser


def _version() -> str:
    try:
        return version("peft-bsr")
    except PackageNotFoundError:  # not installed
        return "unknown"


__all__ = ["COMMANDS", "command_of", "main", "make_parser"]
