"""What the scripts answer, in the ledger's words: replies and server errors become typed values.

Must not: talk to Redis. A reply whose first word nobody expects is a LedgerError, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

from metering.ledger import (
    Balance,
    Corrected,
    Gone,
    GrantState,
    LedgerError,
    LedgerUnavailable,
    NotCorrected,
    Outcome,
    Past,
    Policy,
    RefusalReason,
    SessionState,
    Settled,
    Snapshot,
)
from metering.scripts import Script
from storage.redis_client import RedisReplyError

REFUSALS: dict[bytes, RefusalReason] = {
    b"BALANCE": "balance",
    b"IN_FLIGHT": "in_flight",
    b"REQUESTS": "requests",
    b"PARALLEL": "parallel",
    b"DEBT": "debt",
    b"BLOCKED": "blocked",
    b"CONFLICT": "conflict",
    b"TOMBSTONE": "tombstone",
    b"FINISHED": "finished",
}
_NOT_CORRECTED: dict[bytes, Literal["late", "lower", "open", "ended", "fenced", "unknown"]] = {
    b"LATE": "late",
    b"LOWER": "lower",
    b"OPEN": "open",
    b"FINAL": "ended",
    b"FENCED": "fenced",
    b"UNKNOWN": "unknown",
}
BALANCE_FIELDS = ("av", "hd", "db", "tc", "ns", "hc", "lim", "pol")
POLICIES: tuple[Policy, ...] = get_args(Policy)
_NOT_NOW = frozenset(
    ("OOM", "MISCONF", "READONLY", "LOADING", "BUSY", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN")
)
"""Error codes with which a server says that it did not run the script and may do so later."""


def translated(error: RedisReplyError) -> LedgerError:
    return LedgerUnavailable(str(error)) if error.code in _NOT_NOW else LedgerError(str(error))


def refused(script: Script, reply: list[Any]) -> LedgerError:
    return LedgerError(f"{script.name} refused: {b' '.join(reply[:2]).decode(errors='replace')}")


def gone(script: Script, reply: list[Any]) -> Gone:
    code = reply[0]
    if code == b"FINAL":
        return Gone("final", int(reply[1]))
    if code == b"FENCED":
        return Gone("fenced")
    if code == b"UNKNOWN":
        return Gone("unknown")
    raise refused(script, reply)


def ended(script: Script, reply: list[Any], *, swept_is_gone: bool) -> Settled | Gone:
    code = reply[0]
    if code == b"SETTLED" or (code == b"FINAL" and not (swept_is_gone and reply[5] == b"swept")):
        return Settled(int(reply[1]), int(reply[2]), int(reply[3]), int(reply[4]), code == b"FINAL")
    return gone(script, reply)


def corrected(script: Script, reply: list[Any]) -> Corrected | NotCorrected:
    code = reply[0]
    if code == b"CORRECTED" or code == b"EXISTS":
        return Corrected(int(reply[1]), int(reply[2]), int(reply[3]), int(reply[4]), code == b"EXISTS")
    if code == b"BOUNDS":
        raise refused(script, reply)
    return NotCorrected(_NOT_CORRECTED[code])


def read_past(row: list[bytes | None], uid: str) -> Past | None:
    """`row` is a session's st, o, c and u. A tombstone stands for a session that never was."""
    state, outcome, charged, owner = row
    if owner != uid.encode():
        return None
    if state == b"H":
        return Past(None)
    if outcome is None or charged is None:
        raise LedgerError("an ended session has no outcome")
    return Past(cast("Outcome", outcome.decode()), int(charged))


def read_balance(row: Sequence[str | bytes | None]) -> Balance:
    """`row` is an account's BALANCE_FIELDS. Raises LedgerError for a policy that nobody knows."""
    available, held, debt, charged, sessions, line, limit = (int(value or 0) for value in row[:-1])
    policy = row[-1] or "cutoff"
    for known in POLICIES:
        if policy in (known, known.encode()):
            return Balance(available, held, debt, charged, sessions, line, limit, known)
    raise LedgerError(f"an account has the policy {policy!r}")


def read_snapshot(reply: list[Any]) -> Snapshot:
    row = _pairs(reply[4])
    parts: dict[str, dict[str, int]] = {}
    for name, value in _pairs(reply[5]).items():
        gid, _, part = name.rpartition(":")
        parts.setdefault(gid, {})[part] = int(value)
    # Without an issued part it is no grant: an adjustment's answer, or a grant that was revoked before it came.
    grants = {gid: _read_grant(part) for gid, part in parts.items() if "i" in part}
    sessions = {sid.decode(): _read_session(rest) for sid, state, *rest in reply[7] if state == b"H"}
    return Snapshot(
        epoch=int(reply[1]),
        entry=int(reply[2]),
        now_ms=int(reply[3]),
        balance=read_balance([row.get(name) for name in BALANCE_FIELDS]),
        grants=grants,
        burn_order=tuple(member.decode().split("|", 3)[3] for member in reply[6]),
        sessions=sessions,
    )


def _read_grant(part: dict[str, int]) -> GrantState:
    issued, available, held, consumed, expired, voided, expires_ms = (part.get(name, 0) for name in "iahcxve")
    return GrantState(issued, available, held, consumed, expired, voided, expires_ms, "z" in part)


def _read_session(fields: list[bytes]) -> SessionState:
    _, held, metered, slices, deadline, line = fields
    parts = (part.partition("=") for part in slices.decode().split(",") if part)
    return SessionState(
        held=int(held),
        metered=int(metered),
        slices={gid: int(micros) for gid, _, micros in parts},
        lease_until_ms=int(deadline) if deadline else None,
        line=int(line),
    )


def _pairs(flat: list[bytes]) -> dict[str, str]:
    return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
