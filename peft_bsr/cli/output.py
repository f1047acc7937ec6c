"""What commands say: tables and notes for people, one JSON object for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Output:
    """The screen.

    Args:
        is_json: Whether stdout is for machines: tables are left out, notes go to stderr.
        is_debug: Whether libraries may log.

    Attributes:
        exit_code: Of a command that ends in order; 1 where its answer is no.
    """

    def __init__(self, is_json: bool, is_debug: bool) -> None:
        self.is_json, self.is_debug = is_json, is_debug
        self.exit_code = 0
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot write a class's name shows what it can
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self._screen = Console(highlight=False, soft_wrap=False)
        self._notes = Console(stderr=True, highlight=False)
        if not is_debug:
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()

    def note(self, text: str) -> None:
        """A line on what is being done, on stderr."""
        self._notes.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """A spinner beside `text` while the block runs."""
        with self._notes.status(Text(text)):
            yield

    def say(self, text: str) -> None:
        """A line of the answer; not with `--json`."""
        if not self.is_json:
            self._screen.print(text, markup=False)

    def line(self, text: str) -> None:
        """A line to be copied, never broken; not with `--json`."""
        if not self.is_json:
            self._screen.print(text, markup=False, soft_wrap=True)

    def facts(self, title: str, values: Mapping[str, Any]) -> None:
        """Names and values below a title; not with `--json`."""
        table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in values.items():
            table.add_row(Text(name), Text(str(value)))
        self._table(table)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: Collection[int] = (0,)
    ) -> None:
        """A table; not with `--json`.

        Args:
            title: Above.
            columns: Headings.
            rows: As many texts or numbers each.
            left: Indices of columns that are aligned left; the others are numbers.
        """
        table = Table(title=Text(title), title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index in left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._table(table)

    def write_json(self, result: Mapping[str, Any]) -> None:
        """The one JSON object on stdout."""
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")

    def _table(self, table: Table) -> None:
        if not self.is_json:
            self._screen.print(table)


__all__ = ["Output"]
