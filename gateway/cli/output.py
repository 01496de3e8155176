"""What commands print: a table for people or one JSON document on stdout, progress on stderr while somebody looks.

Must not: print progress into a pipe, interpret markup in data, or let data move the cursor.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 200
"""Columns assumed when stdout is no terminal, so that nothing is cut for `grep`."""

Document = Mapping[str, Any]
Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Adds `--json` as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")(command)


def clean(value: object) -> str:
    """A value as one line of printable text; `-` for None."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    return "".join(char if char.isprintable() else "\N{MIDDLE DOT}" for char in str(value))


def emit_json(document: Document, *, one_line: bool = False) -> None:
    """One JSON document on stdout; times are ISO 8601 in UTC."""
    click.echo(json.dumps(document, indent=None if one_line else 2, ensure_ascii=True, default=_plain))


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    raise TypeError(type(value).__name__)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table on stdout; columns named in `right` are numbers."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(clean(value)) for value in row))
    console = _console()
    console.print(made)
    if not rows:
        console.print("(none)", style="dim")


def facts(title: str, pairs: Sequence[tuple[str, object]]) -> None:
    """One thing's properties, a line each, on stdout."""
    width = max(len(name) for name, _ in pairs)
    click.secho(title, bold=True)
    for name, value in pairs:
        click.echo(f"  {name.ljust(width)}  {clean(value)}")


def note(text: str) -> None:
    """A line for people on stderr, beside the result."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress(first: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while the block runs, if stderr is a terminal; the yielded function changes its text."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(first)) as status:
        yield lambda text: status.update(Text(clean(text)))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
