"""Planner, kept tokens and benchmark in a browser, served on this machine. Needs `pip install 'peft-bsr[app]'`."""

from __future__ import annotations

import argparse

from peft_bsr.cli.output import Output
from peft_bsr.errors import MissingDependencyError, UsageError

EXAMPLES = """\
examples:
  peft-bsr app
  peft-bsr app --port 8000 --root-path /plan
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, help="default: the first free port from 7860 up")
    parser.add_argument("--root-path", metavar="PATH", help="path prefix that a proxy serves it under, such as /plan")


def run(args: argparse.Namespace, out: Output) -> dict[str, object]:
    """Run the command."""
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UsageError(f"`--port {args.port}` must be from 1 to 65535.")
    try:
        from peft_bsr.app.serving import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingDependencyError("the app needs gradio. Run `pip install 'peft-bsr[app]'`.") from error
    with out.doing("starting"):
        page = serve(args.host, args.port, args.root_path)
    out.note(f"{page.local_url}  (Ctrl+C ends it)")
    page.block_thread()
    return {"url": page.local_url}
