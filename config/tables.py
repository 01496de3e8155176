"""What every table of the configuration file has in common.

Must not: know any of them.
"""

from __future__ import annotations

import msgspec


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A TOML table: unknown keys are errors, so that a misspelt bound is never silently the default."""


def at_least(table: Table, names: tuple[str, ...], least: int) -> None:
    """Raises ValueError, which begins with the key at fault, for a number below its bound. None is no number."""
    for name in names:
        value = getattr(table, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: {value} is below {least}.")
