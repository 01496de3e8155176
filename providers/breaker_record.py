"""What gateways tell each other about one candidate's breaker: a record whose greatest value is the truth. Pure.

Must not: read a clock or decide when a breaker opens.

How merges behave: records of one candidate are totally ordered and `merge` takes the greater, so it is commutative,
associative and idempotent (a join semilattice): every gateway that has seen the same records, in any order and however
often, holds the same one. The order is (era, open before closed, until, strikes, reason, at):
- an era is a logical clock (Lamport 1978): each opening and each closing is one more than the greatest era that its
  gateway knew. What was decided knowing more wins, whoever's wall clock is ahead; where the last writer won, a slow one
  would close a breaker that has just opened.
- in one era (two gateways decided without knowing of each other) open beats closed and the longer time wins; strikes do
  not add up, so that ten gateways that see one outage back off as one.
- a gateway that missed a closing loses its own opening to it, counts anew, and opens in a greater era.

The bytes are fixed-width hexadecimal after the version, so that the greater record is also the greater string: a store
merges with one comparison (`if new > old then set`), also for a version that it does not know.
"""

from __future__ import annotations

import re
from enum import IntEnum

import msgspec

VERSION = b"1"
ERA_MAX = 16**12 - 1
STRIKES_MAX = 255
MS_MAX = 16**12 - 1
_FORM = re.compile(rb"1([0-9a-f]{12})([01])([0-9a-f]{12})([0-9a-f]{2})([0-5])([0-9a-f]{12})")
RECORD_BYTES = 41


class Reason(IntEnum):
    """Why a breaker is open; the greater one is shown where two gateways differ."""

    NONE = 0
    CONSECUTIVE = 1
    ERROR_RATE = 2
    PROBE = 3
    RETRY_AFTER = 4
    KEY_REFUSED = 5


class Record(msgspec.Struct, frozen=True, order=True):
    """One opening or closing. `until_ms` and `at_ms` are wall-clock milliseconds since 1970: until when it is open, and
    when it was decided. The order of the fields is the order of records."""

    era: int = 0
    open: bool = False
    until_ms: int = 0
    strikes: int = 0
    reason: Reason = Reason.NONE
    at_ms: int = 0


def encode(record: Record) -> bytes:
    """41 bytes of ASCII, ordered as records are."""
    return b"%b%012x%d%012x%02x%d%012x" % (
        VERSION,
        min(record.era, ERA_MAX),
        record.open,
        min(max(record.until_ms, 0), MS_MAX),
        min(record.strikes, STRIKES_MAX),
        record.reason,
        min(max(record.at_ms, 0), MS_MAX),
    )


def decode(data: bytes) -> Record | None:
    """The record, or None for another version or anything else: it is as if nothing had been shared."""
    found = _FORM.fullmatch(data)
    if found is None:
        return None
    era, opened, until_ms, strikes, reason, at_ms = found.groups()
    return Record(
        int(era, 16), opened == b"1", int(until_ms, 16), int(strikes, 16), Reason(int(reason)), int(at_ms, 16)
    )


def merge(ours: bytes, theirs: bytes) -> bytes:
    """The record that holds when both were seen. Equal to the greater of the two strings."""
    return max(ours, theirs)
