"""Output of commands: tables and notes as text, or one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Output:
    """Output of a command: results on stdout, notes on stderr.

    Args:
        is_json: Whether stdout is JSON; tables are not printed then.
        is_debug: Whether libraries may log.

    Attributes:
        exit_code: Exit code of a command without an error; 1 if its result is negative.
    """

    def __init__(self, is_json: bool, is_debug: bool) -> None:
        self.is_json, self.is_debug = is_json, is_debug
        self.exit_code = 0
        for stream in (sys.stdout, sys.stderr):  # if the terminal cannot encode the name of a class
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self._screen = Console(highlight=False, soft_wrap=False)
        self._notes = Console(stderr=True, highlight=False)
        if not is_debug:
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()

    def note(self, text: str) -> None:
        """Print a line about the progress, on stderr."""
        self._notes.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """Context manager: show a spinner next to `text`."""
        with self._notes.status(Text(text)):
            yield

    def say(self, text: str) -> None:
        """Print a line of the result; not with `--json`."""
        if not self.is_json:
            self._screen.print(text, markup=False)

    def line(self, text: str) -> None:
        """Print a line without wrapping, so that it can be copied; not with `--json`."""
        if not self.is_json:
            self._screen.print(text, markup=False, soft_wrap=True)

    def facts(self, title: str, values: Mapping[str, object]) -> None:
        """Print names and values below a title; not with `--json`."""
        table = Table(title=Text(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in values.items():
            table.add_row(Text(name), Text(str(value)))
        self._table(table)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], left: Collection[int] = (0,)
    ) -> None:
        """Print a table; not with `--json`.

        Args:
            title: Title of the table.
            columns: Column headings.
            rows: Rows with one value per column.
            left: Indices of left-aligned columns; the others are right-aligned.
        """
        table = Table(title=Text(title), title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if index in left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self._table(table)

    def write_json(self, result: Mapping[str, object]) -> None:
        """Print the JSON object on stdout."""
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")

    def _table(self, table: Table) -> None:
        if not self.is_json:
            self._screen.print(table)


__all__ = ["Output"]
