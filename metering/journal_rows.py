"""One outbox entry becomes Postgres rows: session, entry, postings that sum to zero, consumption per grant.

Pure. Must not: talk to any store, guess at money (an entry whose money cannot be read is Poison, and is kept whole), or
refuse an entry for its metadata (that part is opaque: what cannot be read becomes null).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any, Final

import msgspec

from metering.ledger import MICROS_MAX

Row = tuple[Any, ...]

SESSION_COLUMNS: Final = (
    "month", "sid", "shard", "ep", "n", "account_id", "key_id", "outcome", "charged", "absorbed", "debt", "metered",
    "prompt_cost", "price_version", "started_at", "ended_at", "route", "provider", "model", "source", "stream",
    "prompt_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens", "metadata",
)  # fmt: skip
ENTRY_COLUMNS: Final = ("shard", "ep", "n", "type", "account_id", "sid", "at")
POSTING_COLUMNS: Final = ("shard", "ep", "n", "leg", "ledger", "amount")
CONSUMPTION_COLUMNS: Final = ("shard", "ep", "n", "grant_id", "amount", "breakage")

OUTCOMES: Final = frozenset({b"completed", b"aborted", b"cut", b"error", b"void", b"swept"})
METADATA_BYTES_MAX: Final = 64 * 1024
TEXT_CHARS_MAX: Final = 200
"""Three such texts and an account id fit a row of the rollup's index (2,704 bytes)."""

_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_WORD = re.compile(rb"[!-~]{0,128}")
_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_MS = 86_400_000
_MS_MAX = 253_402_300_800_000  # the first millisecond of the year 10000
_YEARS = range(2020, 2200)
_TOKENS_MAX = 10**12  # a day's sum of such counts stays far inside BIGINT
_NO_METADATA: Row = (None,) * 11


class Poison(Exception):
    """The entry's money cannot be read; the message says why."""


@dataclass(slots=True)
class Rows:
    """Rows of any number of entries, as tuples in the order of the `*_COLUMNS`. `confirmed` is (grant id, ep, n)."""

    session: list[Row] = field(default_factory=list)
    entry: list[Row] = field(default_factory=list)
    posting: list[Row] = field(default_factory=list)
    consumption: list[Row] = field(default_factory=list)
    confirmed: list[Row] = field(default_factory=list)

    def add(self, shard: int, ep: int, n: int, fields: Mapping[bytes, bytes]) -> None:
        """Convert one outbox entry. Raises Poison, and then has added nothing."""
        at = (shard, ep, n)
        kind = fields.get(b"t")
        if kind == b"settle":
            self._settle(at, fields)
        elif kind == b"grant":
            self._grant(at, fields)
        else:
            raise Poison(f"the type {_shown(kind)} is unknown")

    def _settle(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        session = _session(at, fields)
        charged, absorbed, debt = session[8:11]
        spent, repaid, broken = (_slices(fields, name) for name in (b"sl", b"rp", b"br"))
        if charged != sum(spent.values()) + debt:
            raise Poison(f"the charge {charged} is not the consumption {sum(spent.values())} plus the debt {debt}")
        legs = [(f"user:avail:{gid}", -amount) for gid, amount in spent.items()]
        legs += [("user:debt", -debt), ("house:absorbed", -absorbed), ("earned", charged + absorbed)]
        for gid, amount in repaid.items():
            legs += [(f"user:avail:{gid}", -amount), ("user:debt", amount)]
        for gid, amount in broken.items():
            legs += [(f"user:avail:{gid}", -amount), ("breakage", amount)]
        taken = [
            (*at, gid, spent.get(gid, 0) + repaid.get(gid, 0), broken.get(gid, 0))
            for gid in {**spent, **repaid, **broken}
        ]
        self.session.append(session)
        self.entry.append((*at, "settle", session[5], session[1], session[15]))
        self.consumption += taken
        self._post(at, legs)

    def _grant(self, at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> None:
        account, gid = _id(fields, b"u"), _id(fields, b"g")
        amount, repaid, moment = _amount(fields, b"a"), _amount(fields, b"rp"), _moment(fields, b"ts")
        if amount == 0 or repaid > amount:
            raise Poison(f"a grant of {amount} cannot repay {repaid}")
        self.entry.append((*at, "grant", account, None, moment))
        self.confirmed.append((gid, at[1], at[2]))
        if repaid:
            self.consumption.append((*at, gid, repaid, 0))
        self._post(at, [("issuance", -amount), (f"user:avail:{gid}", amount - repaid), ("user:debt", repaid)])

    def _post(self, at: tuple[int, int, int], legs: Sequence[tuple[str, int]]) -> None:
        moved = (leg for leg in legs if leg[1] != 0)
        self.posting += [(*at, number, ledger, amount) for number, (ledger, amount) in enumerate(moved)]


def entry_id(raw: bytes) -> tuple[int, int]:
    """A stream id `<ep>-<n>` as two integers. Raises ValueError."""
    ep, n = raw.split(b"-")
    return int(ep), int(n)


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A stream entry's flat field list as a mapping."""
    names = iter(flat)
    return dict(zip(names, names, strict=True))


def payload(flat: Sequence[bytes]) -> str:
    """A stream entry, whole and in order, as JSON for the dead table; bytes that are no text become base64."""
    return msgspec.json.encode({"fields": [_kept(item) for item in flat]}).decode()


def month_of(sid: str, started_ms: int) -> date:
    """The month of a UUIDv7's own time; of the session's start when `sid` is none or its time is absurd."""
    if _UUID7.fullmatch(sid):
        ms = int(sid[:8] + sid[9:13], 16)
        if ms < _MS_MAX:
            month = _month_of_day(ms // _DAY_MS)
            if month.year in _YEARS:
                return month
    return _month_of_day(started_ms // _DAY_MS)


@lru_cache(maxsize=256)
def _month_of_day(day: int) -> date:
    return (_EPOCH + timedelta(days=day)).date().replace(day=1)


def _session(at: tuple[int, int, int], fields: Mapping[bytes, bytes]) -> Row:
    sid = _id(fields, b"s")
    outcome = fields.get(b"o")
    if outcome not in OUTCOMES:
        raise Poison(f"the outcome {_shown(outcome)} is unknown")
    version = fields.get(b"pv", b"")
    if not _WORD.fullmatch(version):
        raise Poison(f"the price version {_shown(version)} is no word")
    started = _moment(fields, b"st")
    return (
        month_of(sid, int(fields[b"st"])),
        sid,
        *at,
        _id(fields, b"u"),
        _id(fields, b"k"),
        outcome.decode(),
        _amount(fields, b"c"),
        _amount(fields, b"ab"),
        _amount(fields, b"d"),
        _amount(fields, b"m"),
        _amount(fields, b"pc"),
        version.decode(),
        started,
        _moment(fields, b"ts"),
        *_described(fields.get(b"mt", b"")),
    )


def _described(metadata: bytes) -> Row:
    """route, provider, model, source, stream, five token counts, and the JSON itself; null is what it does not say."""
    if not metadata or len(metadata) > METADATA_BYTES_MAX:
        return _NO_METADATA
    try:
        said = msgspec.json.decode(metadata)
        # Written anew, because Postgres refuses some JSON that parsers take (NUL escapes, huge exponents).
        kept = msgspec.json.encode(said).decode()
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        return _NO_METADATA
    if "\\u0000" in kept:
        return _NO_METADATA
    if not isinstance(said, dict):
        return (*_NO_METADATA[:-1], kept)
    texts = (said.get(name) for name in ("route", "provider", "model", "source"))
    counts = (said.get(name) for name in ("prompt", "cached", "cache_write", "output", "reasoning"))
    stream = said.get("stream")
    return (
        *(text if isinstance(text, str) and len(text) <= TEXT_CHARS_MAX else None for text in texts),
        stream if isinstance(stream, bool) else None,
        *(count if type(count) is int and 0 <= count <= _TOKENS_MAX else None for count in counts),
        kept,
    )


def _amount(fields: Mapping[bytes, bytes], name: bytes) -> int:
    raw = fields.get(name)
    if raw is None or not raw.isdigit() or len(raw) > 16 or (value := int(raw)) > MICROS_MAX:
        raise Poison(f"field {name.decode()}: {_shown(raw)} is no amount")
    return value


def _id(fields: Mapping[bytes, bytes], name: bytes) -> str:
    raw = fields.get(name)
    if raw is None or not _ID.fullmatch(raw):
        raise Poison(f"field {name.decode()}: {_shown(raw)} is no id")
    return raw.decode()


def _moment(fields: Mapping[bytes, bytes], name: bytes) -> datetime:
    ms = _amount(fields, name)
    if ms >= _MS_MAX:
        raise Poison(f"field {name.decode()}: {ms} ms is after the year 9999")
    return _EPOCH + timedelta(milliseconds=ms)


def _slices(fields: Mapping[bytes, bytes], name: bytes) -> dict[str, int]:
    """`gid=amount,gid=amount`; an absent or empty list is none."""
    found: dict[str, int] = {}
    listed = fields.get(name)
    if not listed:
        return found
    for part in listed.split(b","):
        gid, _, amount = part.partition(b"=")
        slice_ = {b"gid": gid, b"amount": amount}
        key = _id(slice_, b"gid")
        if key in found:
            raise Poison(f"field {name.decode()}: grant {key} is listed twice")
        found[key] = _amount(slice_, b"amount")
    return found


def _kept(item: bytes) -> str | dict[str, str]:
    try:
        text = item.decode()
    except UnicodeDecodeError:
        text = "\0"
    return {"base64": base64.b64encode(item).decode()} if "\0" in text else text


def _shown(raw: bytes | None) -> str:
    return "(absent)" if raw is None else repr(raw[:80].decode("ascii", "backslashreplace"))
