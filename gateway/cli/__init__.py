"""The command line `tollgate`: one file per group of commands. Must not: hold rules of its own, it asks the packages.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is documented in docs/cli.md."""
    from gateway.cli.app import run

    return run(arguments)
