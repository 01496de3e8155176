"""How the fields of an outbox entry are read: amounts, ids, moments, slices, and what its metadata says.

Pure. Must not: guess at money (what cannot be read is Poison), or refuse an entry for its metadata (that part is
opaque: what cannot be read becomes null).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, Final

import msgspec

from metering.ledger import MICROS_MAX

Row = tuple[Any, ...]

METADATA_COLUMNS: Final = (
    "route", "provider", "model", "source", "stream", "prompt_tokens", "cached_tokens", "cache_write_tokens",
    "output_tokens", "reasoning_tokens", "metadata",
)  # fmt: skip
METADATA_BYTES_MAX: Final = 64 * 1024
TEXT_CHARS_MAX: Final = 200
"""Three such texts and an account id fit a row of the rollup's index (2,704 bytes)."""

_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_MS = 86_400_000
_MS_MAX = 253_402_300_800_000  # the first millisecond of the year 10000
_YEARS = range(2020, 2200)
_TOKENS_MAX = 10**12  # a day's sum of such counts stays far inside BIGINT
_DECODER: Final = msgspec.json.Decoder()
_ENCODER: Final = msgspec.json.Encoder()
_NO_METADATA: Row = (None,) * len(METADATA_COLUMNS)


class Poison(Exception):
    """The entry's money cannot be read; the message says why."""


def month_of(sid: str, started_ms: int) -> date:
    """The month of a UUIDv7's own time; of the session's start when `sid` is none or its time is absurd."""
    own = month_of_ms(int(sid[:8] + sid[9:13], 16)) if _UUID7.fullmatch(sid) else None
    return own or _month_of_day(started_ms // _DAY_MS)


def month_of_ms(ms: int) -> date | None:
    """The month of a time in milliseconds since 1970; None for years that no session is of."""
    if ms < _MS_MAX:
        month = _month_of_day(ms // _DAY_MS)
        if month.year in _YEARS:
            return month
    return None


@lru_cache(maxsize=256)
def _month_of_day(day: int) -> date:
    return (_EPOCH + timedelta(days=day)).date().replace(day=1)


def read_metadata(metadata: bytes) -> Row:
    """route, provider, model, source, stream, five token counts, and the JSON itself; null is what it does not say."""
    if not metadata or len(metadata) > METADATA_BYTES_MAX:
        return _NO_METADATA
    try:
        said = _DECODER.decode(metadata)
        # Written anew, because Postgres refuses some JSON that parsers take (NUL escapes, huge exponents).
        kept = _ENCODER.encode(said).decode()
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return _NO_METADATA
    if "\\u0000" in kept:
        return _NO_METADATA
    if not isinstance(said, dict):
        return (*_NO_METADATA[:-1], kept)
    get = said.get  # of every session: no loop where a line does
    return (
        _text(get("route")), _text(get("provider")), _text(get("model")), _text(get("source")),
        stream if type(stream := get("stream")) is bool else None,
        _count(get("prompt")), _count(get("cached")), _count(get("cache_write")), _count(get("output")),
        _count(get("reasoning")), kept,
    )  # fmt: skip


def _text(said: object) -> str | None:
    return said if type(said) is str and len(said) <= TEXT_CHARS_MAX else None


def _count(said: object) -> int | None:
    return said if type(said) is int and 0 <= said <= _TOKENS_MAX else None


def read_amount(fields: Mapping[bytes, bytes], name: bytes) -> int:
    """Micros, or another count up to 2^53 - 1. Raises Poison."""
    raw = fields.get(name)
    if raw is None or not raw.isdigit() or len(raw) > 16 or (value := int(raw)) > MICROS_MAX:
        raise Poison(f"field {name.decode()}: {shown(raw)} is no amount")
    return value


def read_id(fields: Mapping[bytes, bytes], name: bytes) -> str:
    """An id. Raises Poison."""
    raw = fields.get(name)
    if raw is None or not _ID.fullmatch(raw):
        raise Poison(f"field {name.decode()}: {shown(raw)} is no id")
    return raw.decode()


def read_moment(fields: Mapping[bytes, bytes], name: bytes) -> datetime:
    """Milliseconds since 1970 as a time. Raises Poison."""
    ms = read_amount(fields, name)
    if ms >= _MS_MAX:
        raise Poison(f"field {name.decode()}: {ms} ms is after the year 9999")
    return _EPOCH + timedelta(milliseconds=ms)


def read_slices(fields: Mapping[bytes, bytes], name: bytes) -> dict[str, int]:
    """`gid=amount,gid=amount`; an absent or empty list is none. Raises Poison."""
    found: dict[str, int] = {}
    listed = fields.get(name)
    if not listed:
        return found
    for part in listed.split(b","):
        gid, _, amount = part.partition(b"=")
        slice_ = {b"gid": gid, b"amount": amount}
        key = read_id(slice_, b"gid")
        if key in found:
            raise Poison(f"field {name.decode()}: grant {key} is listed twice")
        found[key] = read_amount(slice_, b"amount")
    return found


def shown(raw: bytes | None) -> str:
    """A field's value for a message."""
    return "(absent)" if raw is None else repr(raw[:80].decode("ascii", "backslashreplace"))
