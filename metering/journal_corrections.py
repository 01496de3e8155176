"""Entries of the outbox beside grants and settlements: an account's policy, and the correction of a swept session.

Pure. Must not: talk to any store, or guess at money (what cannot be read is Poison).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from metering.journal_fields import (
    METADATA_COLUMNS,
    Poison,
    Row,
    month_of,
    read_amount,
    read_id,
    read_metadata,
    read_moment,
    read_slices,
    shown,
)

CORRECTION_COLUMNS: Final = (
    "shard", "ep", "n", "month", "sid", "account_id", "key_id", "charged", "absorbed", "debt", "at", *METADATA_COLUMNS,
)  # fmt: skip
POLICIES: Final = frozenset({b"cutoff", b"grace", b"postpaid"})


def read_policy(fields: Mapping[bytes, bytes]) -> tuple[str, int, datetime]:
    """Account, revision and moment of a change of policy; it moves nothing. Raises Poison."""
    policy = fields.get(b"pl")
    if policy not in POLICIES:
        raise Poison(f"the policy {shown(policy)} is unknown")
    if read_amount(fields, b"a") and policy == b"cutoff":
        raise Poison("cutoff has a limit")
    return read_id(fields, b"u"), read_amount(fields, b"r"), read_moment(fields, b"ts")


def read_correction(
    at: tuple[int, int, int], fields: Mapping[bytes, bytes]
) -> tuple[Row, dict[str, int], list[tuple[str, int]]]:
    """The row of a correction (CORRECTION_COLUMNS), what it took of each grant, and its legs. Raises Poison."""
    sid, spent = read_id(fields, b"s"), read_slices(fields, b"sl")
    charged, absorbed, debt = (read_amount(fields, name) for name in (b"c", b"ab", b"d"))
    if charged != sum(spent.values()) + debt:
        raise Poison(f"the correction {charged} is not the consumption {sum(spent.values())} plus the debt {debt}")
    row = (
        *at,
        month_of(sid, read_amount(fields, b"ts")),
        sid,
        read_id(fields, b"u"),
        read_id(fields, b"k"),
        charged,
        absorbed,
        debt,
        read_moment(fields, b"ts"),
        *read_metadata(fields.get(b"mt", b"")),
    )
    legs = [(f"user:avail:{gid}", -amount) for gid, amount in spent.items()]
    legs += [("user:debt", -debt), ("house:absorbed", -absorbed), ("earned", charged + absorbed)]
    return row, spent, legs
