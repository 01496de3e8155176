"""What a shard of the real ledger holds, read after a step, and the invariants I1 to I9 of the design on it.

Each invariant is stated on what the server holds, by itself; that the server holds what the model says is asserted
beside it. Must not: change anything.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from metering.ledger import Snapshot
from tests.support.lua_model import Model
from tests.support.lua_model_books import Session
from tests.support.valkey import Stand

SESSION_FIELDS = ("st", "f", "u", "k", "q", "bh", "o", "c", "ab", "n", "cr")


@dataclass(frozen=True, slots=True)
class Seen:
    """The whole shard. Sorted sets and hashes as name -> number; `sessions` sid -> (fields, ms to live or -1); `limits`
    the API key's hash; `keyed` what each idempotency key's record says; `mortal` whether each of them ends some day."""

    snapshot: Snapshot
    n: int
    saved_clock: int
    leases: dict[str, int]
    expiries: dict[str, int]
    sessions: dict[str, tuple[dict[str, str], int]]
    limits: dict[str, int]
    keyed: dict[str, str]
    mortal: bool
    entries: list[tuple[str, dict[str, str]]]


async def look(stand: Stand) -> Seen:
    """Read everything. Nothing else writes meanwhile."""
    call, at = stand.client.call, stand.at
    names, clock, leases, expiries, limits, snapshot, entries = await asyncio.gather(
        call("KEYS", "*"),
        call("HMGET", at.meta, "n", "clk"),
        call("ZRANGE", at.leases, "0", "-1", "WITHSCORES"),
        call("ZRANGE", at.expiries, "0", "-1", "WITHSCORES"),
        call("HGETALL", at.limits + "key"),
        stand.ledger.snapshot(stand.account),
        stand.entries(),
    )
    every = sorted(name.decode() for name in names)
    keyed = [name for name in every if name.startswith(at.idempotency)]
    sessions = [name for name in every if name.startswith(at.session)]
    records, ends, rows, lives = await asyncio.gather(
        asyncio.gather(*(call("GET", name) for name in keyed)),
        asyncio.gather(*(call("PTTL", name) for name in keyed)),
        asyncio.gather(*(call("HMGET", name, *SESSION_FIELDS) for name in sessions)),
        asyncio.gather(*(call("PTTL", name) for name in sessions)),
    )
    return Seen(
        snapshot=snapshot,
        n=int(clock[0]),
        saved_clock=int(clock[1]),
        leases=_scores(leases),
        expiries=_scores(expiries),
        sessions={
            name.removeprefix(at.session): (_fields(row), int(life))
            for name, row, life in zip(sessions, rows, lives, strict=True)
        },
        limits=_scores(limits),
        keyed={name.rpartition(":")[2]: value.decode() for name, value in zip(keyed, records, strict=True)},
        mortal=all(int(life) > 0 for life in ends),
        entries=entries,
    )


def _scores(flat: list[Any]) -> dict[str, int]:
    return {flat[i].decode(): int(flat[i + 1]) for i in range(0, len(flat), 2)}


def _fields(row: list[bytes | None]) -> dict[str, str]:
    return {name: value.decode() for name, value in zip(SESSION_FIELDS, row, strict=True) if value is not None}


def slices(listed: str) -> dict[str, int]:
    """`gid=amount,gid=amount` as a mapping."""
    parts = (part.partition("=") for part in listed.split(",") if part)
    return {gid: int(amount) for gid, _, amount in parts}


def add_up(seen: Seen) -> None:
    """I1 to I5: every micro of the account is in exactly one place."""
    grants, balance = seen.snapshot.grants, seen.snapshot.balance
    held, consumed = 0, 0
    for one in grants.values():
        parts = (one.available, one.held, one.consumed, one.expired, one.voided)
        assert one.issued == sum(parts), "I1"
        assert min(parts) >= 0, "I1"
        held, consumed = held + one.held, consumed + one.consumed
    assert balance.available == sum(one.available for one in grants.values()), "I2"
    sessions = seen.snapshot.sessions.values()
    assert balance.held == held + balance.line == sum(one.held for one in sessions), "I3"
    assert balance.line == sum(one.line for one in sessions), "I3"
    assert all(one.held == sum(one.slices.values()) + one.line for one in sessions), "I3"
    open_sids = {sid for sid, (fields, _) in seen.sessions.items() if fields["st"] == "H"}
    assert balance.sessions == len(open_sids) == len(sessions), "I4"
    assert {f"acc|{sid}" for sid in open_sids} == seen.leases.keys(), "I4, I7"
    gone = sum(one.expired + one.voided + one.consumed for one in grants.values())
    issued = sum(one.issued for one in grants.values())
    assert balance.available == issued - gone - (balance.held - balance.line), "I5"
    assert consumed == balance.charged - balance.debt, "I5"


def owe_no_more(seen: Seen, before: Seen | None) -> None:
    """I6: debt only where no grant can pay, and never above the limit, except for what a limit found when it fell."""
    balance, now = seen.snapshot.balance, seen.snapshot.now_ms
    live = sum(one.available for one in seen.snapshot.grants.values() if not 0 < one.expires_ms <= now)
    assert balance.debt == 0 or live == 0, "I6"
    was = before.snapshot.balance if before else None
    assert min(balance.debt, balance.line) >= 0, "I6"
    assert balance.debt + balance.line <= max(balance.limit, was.debt + was.line if was else 0), "I6"


def journal_all(seen: Seen, model: Model) -> None:
    """I8 and I9: the journal has no gap, ends each session once, and says who paid; replayed, it is the account."""
    assert [name for name, _ in seen.entries] == [f"1-{n}" for n in range(1, seen.n + 1)], "I8"
    entries = [fields for _, fields in seen.entries]
    ends = {fields["s"]: fields for fields in entries if fields["t"] == "settle"}
    corrections = {fields["s"]: fields for fields in entries if fields["t"] == "correct"}
    kinds = [fields["t"] for fields in entries]
    assert len(ends) == kinds.count("settle"), "I8"
    assert len(corrections) == kinds.count("correct"), "I8"
    assert ends.keys() == {sid for sid, (fields, _) in seen.sessions.items() if fields["st"] == "T"}, "I8"
    assert corrections.keys() <= {sid for sid, fields in ends.items() if fields["o"] == "swept"}, "I8"
    for sid, end in ends.items():
        both = [end, *([corrections[sid]] if sid in corrections else [])]
        for fields in both:
            assert int(fields["c"]) == sum(slices(fields["sl"]).values()) + int(fields["d"]), "I9"
        paid_for(sum(int(one["c"]) for one in both), sum(int(one["ab"]) for one in both), model.sessions[sid])
    replayed(seen, entries)


def paid_for(charged: int, absorbed: int, session: Session) -> None:
    """I9 of one session: what was asked of it is charged or absorbed; under cutoff within what covered it."""
    assert charged + absorbed == session.due, "I9"
    assert (charged, absorbed) == (session.charged, session.absorbed), "I9"
    assert session.cover is None or charged <= session.cover, "I9"


def replayed(seen: Seen, entries: list[dict[str, str]]) -> None:
    """The journal alone gives each grant's parts, the debt and the total charged, as Postgres will have them."""
    parts: dict[str, dict[str, int]] = {gid: dict.fromkeys("icxv", 0) for gid in seen.snapshot.grants}
    debt = charged = 0
    for fields in entries:
        kind, gid = fields["t"], fields.get("g", "")
        if kind == "grant":
            parts[gid]["i"], repaid = int(fields["a"]), int(fields["rp"])
            parts[gid]["c"], debt = parts[gid]["c"] + repaid, debt - repaid
        elif kind in ("expire", "revoke") and gid in parts:
            parts[gid]["x" if kind == "expire" else "v"] += int(fields["a"])
        elif kind in ("settle", "correct"):
            debt, charged = debt + int(fields["d"]), charged + int(fields["c"])
            debt -= sum(slices(fields.get("rp", "")).values())
        for name, part in (("sl", "v" if kind == "adjust" else "c"), ("br", "x"), ("vd", "v"), ("rp", "c")):
            for one, amount in slices(fields.get(name, "") if kind != "grant" else "").items():
                parts[one][part] += amount
    grants = seen.snapshot.grants.items()
    now = {gid: {"i": one.issued, "c": one.consumed, "x": one.expired, "v": one.voided} for gid, one in grants}
    assert parts == now, "the journal and the grants differ"
    balance = seen.snapshot.balance
    assert (debt, charged) == (balance.debt, balance.charged), "the journal and the account differ"


def is_the_model(seen: Seen, model: Model) -> None:
    """What the server holds is what the model says, to the last field."""
    snapshot = seen.snapshot
    assert (snapshot.entry, snapshot.now_ms, seen.saved_clock) == (model.n, model.now, model.saved)
    assert snapshot.balance == model.balance
    found = {
        gid: (one.available, one.held, one.consumed, one.expired, one.voided, one.issued, one.expires_ms, one.revoked)
        for gid, one in snapshot.grants.items()
    }
    assert found == {
        gid: (one.a, one.h, one.c, one.x, one.v, one.issued, one.expires, one.revoked)
        for gid, one in model.grants.items()
    }
    assert list(snapshot.burn_order) == model.burn_order()
    assert seen.expiries == {f"acc|{gid}": end for gid, end in model.expiries().items()}
    assert seen.leases == {f"acc|{sid}": one.lease for sid, one in model.open().items()}
    assert snapshot.sessions == {sid: one.open_state() for sid, one in model.open().items()}
    for sid, one in snapshot.sessions.items():
        assert list(one.slices) == list(model.sessions[sid].slices), "held slices pay in the order they were taken"
    assert {"p": 0} | seen.limits == model.limits()
    assert seen.mortal
    assert seen.keyed == {key: f"{sid} {body}" for key, (sid, body) in model.keyed.items()}
    assert seen.sessions.keys() == model.sessions.keys()
    for sid, (fields, life) in seen.sessions.items():
        assert (life == -1) == (fields["st"] == "H"), "I7"
        assert fields == record(model.sessions[sid])


def record(session: Session) -> dict[str, str]:
    """What a session's hash says of it."""
    if session.state == "V":
        return {"st": "V"}
    fields = {"st": session.state, "f": str(session.fence), "u": "acc", "k": "key"}
    if session.state == "H":
        return fields | {"q": str(session.q), "bh": session.body}
    ended = {"c": session.charged, "ab": session.absorbed, "n": session.entry}
    if session.correction is not None:
        ended["cr"] = session.correction.entry
    return fields | {"o": str(session.outcome)} | {name: str(value) for name, value in ended.items()}


def check(seen: Seen, before: Seen | None, model: Model) -> None:
    """Every invariant, on what is there now and what was there before the step."""
    add_up(seen)
    owe_no_more(seen, before)
    journal_all(seen, model)
    is_the_model(seen, model)
