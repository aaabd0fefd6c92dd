"""Everything that is printed: results on standard output, progress and remarks on standard error.

What a stranger's file, folder or simulator says reaches the terminal as plain text: nothing in it is obeyed, as escape
sequence or markup. Output that cannot be written (a closed pipe, a full disk) never ends the work.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from diffusion_policy.basics.text import printable


class Terminal(Console):
    """A console that prints texts as they are, each on a line of its own: no markup, and nothing that a terminal would
    obey, a line break in a stranger's name least of all. Where it cannot write it falls silent."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Texts and cells of tables."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's."""
        self._write(lambda: super(Terminal, self).print(*objects, **options))

    def print_lines(self, text: str, **options: Any) -> None:
        """Text of ours that has several lines."""
        for line in text.split("\n"):
            self.print(line, **options)

    def on_broken_pipe(self) -> None:
        """Who read has gone (`| head`)."""
        raise BrokenPipeError

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, ValueError):  # ValueError: the file was closed
            self._fall_silent()

    def _fall_silent(self) -> None:
        self.quiet = True
        self._buffer.clear()
        stream = sys.stderr if self.stderr else sys.stdout
        try:  # what Python still holds back would be an error when it ends
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except (OSError, ValueError, AttributeError):
            pass


console = Terminal(stderr=True)
"""Progress and remarks."""
out = Terminal(soft_wrap=True)
"""Results: each line stays one line, however long."""


def open_standard_streams() -> None:
    """Have standard input, output and error lead somewhere, where they were closed before: else the next file that is
    opened takes their place and gets what simulators print. Characters that the output's encoding lacks are spelled
    out."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]


def progress_bar(unit: str) -> Progress:
    """A bar with count and time left; its tasks have a field `note`, shown at the end. It fits 80 columns."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=18),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}"),
        console=console,
    )


def print_cells(title: str, rows: str, by: str, cells: Mapping[str, Mapping[str, Any]], figure: str, form: str) -> None:
    """A table of one figure: a row a sampler or strategy (`rows`), a column a number of steps or a delay (`by`). Cells
    are {figure: number or None, or {"value": ...}}; a dash where there is none."""
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    table = Table(rows, *columns, title=f"{title}, by {by}", title_justify="left")
    for name, row in cells.items():
        found = [row.get(column, {}).get(figure) for column in columns]
        values = [value["value"] if isinstance(value, dict) else value for value in found]
        table.add_row(name, *("-" if value is None else form.format(value) for value in values))
    console.print(table)
