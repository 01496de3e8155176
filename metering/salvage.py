"""What survived in a shard of Redis that lost something: sessions in its outbox and holds, as receipts in Postgres.

Sessions are told apart by their id, never by their entry's number, which a forked history uses again. What Postgres
knew first (grants, revocations, adjustments, policies) and what follows from it (expiries) is applied again from there,
so it is not salvaged. Must not: change Redis.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

import msgspec

from metering import receipts
from metering.journal_fields import month_of
from metering.journal_rows import OUTCOMES, entry_id, pairs
from metering.keys import SHARDS
from metering.ledger import AccountRef, Outcome
from metering.lost_holds import KEY
from metering.receipts import HELD, SETTLED, Receipt
from storage.database import Connection

log = logging.getLogger(__name__)

PAGE: Final = 500
STAND_IN: Final = KEY.encode()


class Redis(Protocol):
    """The part of the Redis client that salvage needs."""

    def call(self, *args: str | bytes | int) -> Awaitable[Any]:
        """Send one command; the awaited result is its reply."""


def account_of(receipt: Receipt) -> AccountRef:
    """Whose session it is."""
    return AccountRef(receipt.account, receipt.shard)


def outcome_of(receipt: Receipt) -> Outcome:
    """Its outcome, checked. Raises ValueError."""
    if receipt.outcome.encode() not in OUTCOMES:
        raise ValueError(f"session {receipt.session}: the outcome {receipt.outcome!r} is unknown")
    return cast("Outcome", receipt.outcome)


async def forked(redis: Redis, connection: Connection, shards: Sequence[int]) -> set[int]:
    """Shards whose outbox has, under a number that Postgres has too, another entry."""
    rows = await connection.fetch("SELECT shard, ep, n FROM shard_cursor WHERE shard = ANY($1::smallint[])", shards)
    found = set()
    for row in rows:
        last = f"{row['ep']}-{row['n']}"
        entries = await redis.call("XRANGE", SHARDS[row["shard"]].outbox, f"{row['ep']}-0", last) if row["n"] else []
        here = {entry_id(raw)[1]: pairs(flat) for raw, flat in entries}
        there = await connection.fetch(
            "SELECT n, type, sid FROM entry WHERE shard = $1 AND ep = $2 AND n = ANY($3::bigint[])",
            row["shard"],
            row["ep"],
            list(here),
        )
        if any(not _same(here[each["n"]], each) for each in there):
            found.add(row["shard"])
    return found


def _same(fields: Mapping[bytes, bytes], row: Any) -> bool:
    sid = fields.get(b"s", b"").decode(errors="replace") or None
    return bool(row["type"] == fields.get(b"t", b"").decode(errors="replace") and row["sid"] == sid)


async def shard(redis: Redis, connection: Connection, number: int, sessions: Sequence[bytes]) -> set[bytes]:
    """Write receipts of everything that survived in one shard. `sessions` are the names of its session keys; answers
    those of them that must stay: tombstones, and ended sessions that Postgres has. Swept ones do not stay, they are
    made anew by their receipts: Postgres may have a correction that Redis has not, and it must not come twice."""
    found = {one.session: one async for one in _outbox(redis, number)}
    ended: dict[str, bytes] = {}
    swept: dict[str, Receipt] = {}
    kept: set[bytes] = set()
    async for name, fields in _sessions(redis, sessions):
        sid = name[len(SHARDS[number].session) :].decode(errors="replace")
        if fields.get(b"k") == STAND_IN and fields.get(b"st") == b"H":
            continue  # what it stands in for is reckoned anew
        if fields.get(b"st") == b"V":
            kept.add(name)
        elif fields.get(b"st") == b"T":
            ended[sid] = name
            if fields.get(b"o") == b"swept":
                swept[sid] = _hold(number, sid, fields)
        elif fields.get(b"st") == b"H":
            held = _hold(number, sid, fields)
            found[sid] = _joined(found[sid], held) if sid in found else held
    known = {one.session: one for one, _ in await receipts.unarrived(connection, [number])}
    merged = [_joined(known[sid], one) if sid in known else one for sid, one in found.items()]
    arrived = await _arrived(connection, {sid: name for sid, name in ended.items() if sid not in known})
    await receipts.save(connection, [*merged, *(swept[sid] for sid in arrived & swept.keys())])
    return kept | {ended[sid] for sid in arrived - swept.keys()}


async def _sessions(redis: Redis, names: Sequence[bytes]) -> AsyncIterator[tuple[bytes, dict[bytes, bytes]]]:
    """Session keys with their fields."""
    for at in range(0, len(names), PAGE):
        page = names[at : at + PAGE]
        for name, flat in zip(page, await asyncio.gather(*(redis.call("HGETALL", one) for one in page)), strict=True):
            yield name, pairs(flat)


async def _outbox(redis: Redis, number: int) -> AsyncIterator[Receipt]:
    """Sessions' ends that are in the outbox, whatever their numbers; a correction is added to its session's charge."""
    found: dict[str, Receipt] = {}
    start = "-"
    while True:
        entries = await redis.call("XRANGE", SHARDS[number].outbox, start, "+", "COUNT", PAGE)
        for raw, flat in entries:
            fields = pairs(flat)
            sid = fields.get(b"s", b"").decode(errors="replace")
            if fields.get(b"t") == b"settle":
                found[sid] = _settlement(number, sid, entry_id(raw), fields)
            elif fields.get(b"t") == b"correct" and sid in found:
                charge = found[sid].charge + _number(fields, b"c")
                found[sid] = msgspec.structs.replace(found[sid], charge=charge, metadata=fields.get(b"mt", b""))
            elif fields.get(b"t") == b"correct":
                log.error("salvage: the correction of session %s by %s micros is lost", sid, fields.get(b"c"))
        if len(entries) < PAGE:
            break
        start = "({}-{}".format(*entry_id(entries[-1][0]))
    for one in found.values():
        yield one


def _settlement(number: int, sid: str, at: tuple[int, int], fields: Mapping[bytes, bytes]) -> Receipt:
    return Receipt(
        session=sid,
        account=fields.get(b"u", b"").decode(errors="replace"),
        shard=number,
        key=fields.get(b"k", b"").decode(errors="replace"),
        fence=_number(fields, b"st"),
        kind=SETTLED,
        epoch=at[0],
        entry=at[1],
        charge=_number(fields, b"c"),
        outcome=fields.get(b"o", b"").decode(errors="replace"),
        metadata=fields.get(b"mt", b""),
        metered=_number(fields, b"m"),
        prompt=_number(fields, b"pc"),
        price=fields.get(b"pv", b"").decode(errors="replace"),
    )


def _hold(number: int, sid: str, fields: Mapping[bytes, bytes]) -> Receipt:
    owner, body, price = (fields.get(name, b"").decode(errors="replace") for name in (b"ow", b"bh", b"pv"))
    return Receipt(
        session=sid,
        account=fields.get(b"u", b"").decode(errors="replace"),
        shard=number,
        key=fields.get(b"k", b"").decode(errors="replace"),
        fence=_number(fields, b"f"),
        kind=HELD,
        metadata=fields.get(b"mt", b""),
        held=_number(fields, b"h"),
        metered=_number(fields, b"m"),
        seq=_number(fields, b"q"),
        prompt=_number(fields, b"pc"),
        owner=owner,
        body=body,
        price=price,
    )


def _joined(known: Receipt, survived: Receipt) -> Receipt:
    """Two receipts of one session: the end that either knows, the latest figures, and the description that survived."""
    end, other = (known, survived) if known.kind >= survived.kind else (survived, known)
    return msgspec.structs.replace(
        end,
        held=max(end.held, other.held),
        metered=max(end.metered, other.metered),
        seq=max(end.seq, other.seq),
        prompt=end.prompt or other.prompt,
        owner=end.owner or other.owner,
        body=end.body or other.body,
        price=end.price or other.price,
        metadata=end.metadata or other.metadata,
    )


def _number(fields: Mapping[bytes, bytes], name: bytes) -> int:
    """A stored amount; damage counts as 0, so that the rest is salvaged."""
    raw = fields.get(name, b"")
    return int(raw) if raw.isdigit() and len(raw) <= 16 else 0


async def _arrived(connection: Connection, names: Mapping[str, bytes]) -> set[str]:
    """Which of these sessions Postgres has."""
    months = {month_of(sid, 0) for sid in names} if names else set()
    rows = await connection.fetch(
        "SELECT sid FROM session WHERE sid = ANY($1::text[]) AND ($2 OR month = ANY($3::date[]))",
        list(names),
        any(month.year < 2020 for month in months),  # an id that is no UUIDv7 may be of any month
        list(months),
    )
    return {row["sid"] for row in rows}
