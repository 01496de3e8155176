"""The check after a chaos run, of four records that know nothing of each other: clients, providers, Redis, Postgres.

Every micro that was charged must have been served, every charge told to a client must be the one in Postgres, and every
account's grants must add up. What a dead gateway gave away is counted, and bounded where a bound is published.
Pure. Must not: talk to anything, or tolerate a difference of one micro.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.reconcile import Verdict, between
from loadtests.simulated_provider.text import count
from loadtests.users.calls import Call

Document = Mapping[str, Any]
UNBILLED_TOKENS = 256
"""The published bound on what a killed gateway gives away of one stream, beside a prompt that it had not checkpointed;
one second of output at the pace of a run is less."""


@dataclass(slots=True)
class ChaosVerdict(Verdict):
    """`micros`: the sum of all differences of amounts, what the run lost or created. `unbilled_max`: the most tokens of
    one stream that were delivered and not charged."""

    micros: int = 0
    unbilled_max: int = 0

    def equal(self, what: str, found: int, expected: int) -> None:
        """Two amounts in micros that must be the same."""
        self.micros += abs(found - expected)
        self.same(what, found, expected)

    def at_most(self, what: str, found: int, bound: int) -> None:
        """An amount in micros that must not exceed another."""
        self.micros += max(0, found - bound)
        self.expect(found <= bound, f"{what}: {found}, at most {bound} expected")


@dataclass(slots=True)
class Evidence:
    """What a run left behind. `sessions` are rows of Postgres' table, `served` lines of the providers' logs, `calls`
    the clients' own records; `by_hand` are the charges of sessions that no client of a gateway made, by session id."""

    sessions: Sequence[Document]
    served: Iterable[Document]
    calls: Sequence[Call]
    by_hand: Mapping[str, int] = field(default_factory=dict)
    absorbs: bool = False
    """Whether the house may absorb something: streams that outrun their credit."""
    forked: bool = False
    """Whether two primaries may have sold the same credit: what a client was told is then what its account paid and
    what the house absorbed."""
    unbilled_bound: int | None = None


@dataclass(frozen=True, slots=True)
class AccountState:
    """One account across both stores, in micros. `charged_rows` is the sum over Postgres' sessions."""

    name: str
    issued: int
    available: int
    held: int
    open_sessions: int
    debt: int
    charged: int
    consumed: int
    charged_rows: int
    expired_rows: int = 0


@dataclass(frozen=True, slots=True)
class GrantState:
    """One grant across both stores, in micros; `_rows` are sums over Postgres' journal. `over`: its time is over."""

    id: str
    issued: int
    available: int
    held: int
    consumed: int
    expired: int
    voided: int
    issued_rows: int
    consumed_rows: int
    expired_rows: int
    voided_rows: int
    over: bool = False


def check_sessions(evidence: Evidence, verdict: ChaosVerdict) -> None:
    """Every session against the providers' logs and its client's record; nothing served or told without a session."""
    exchanges: dict[str, list[Document]] = defaultdict(list)
    for entry in evidence.served:
        exchanges[entry["request_id"]].append(entry)
    clients = {call.session: call for call in evidence.calls if call.session}
    known = set()
    for row in evidence.sessions:
        known.add(row["sid"])
        verdict.checked[f"sessions {row['outcome']}"] += 1
        if row["sid"] in evidence.by_hand:
            verdict.equal(f"session {row['sid']}: charge", row["charged"], evidence.by_hand[row["sid"]])
            continue
        request_id = metadata_of(row).get("request_id", "")
        _check_session(row, exchanges.pop(request_id, []), clients.get(row["sid"]), evidence, verdict)
    for request_id, entries in exchanges.items():
        served = max(entry["prompt_tokens"] + entry["served_tokens"] for entry in entries)
        verdict.micros += served
        verdict.expect(False, f"request {request_id} was served {served} tokens and has no session")
    verdict.same("sessions that clients know and Postgres does not", sorted(clients.keys() - known)[:5], [])
    verdict.same("sessions by hand that Postgres does not know", sorted(evidence.by_hand.keys() - known)[:5], [])


def metadata_of(row: Document) -> dict[str, Any]:
    """A session row's metadata, whatever the driver made of it."""
    found = row.get("metadata")
    return dict(json.loads(found)) if isinstance(found, str) else dict(found or {})


def _check_session(
    row: Document, entries: list[Document], call: Call | None, evidence: Evidence, verdict: ChaosVerdict
) -> None:
    name, state, charged = f"session {row['sid']} ({row['outcome']})", row["outcome"], row["charged"]
    if not evidence.absorbs:
        verdict.equal(f"{name}: absorbed", row["absorbed"], 0)
    if call is not None:
        verdict.checked["sessions with their client's own record"] += 1
        if call.told_micros is not None:
            verdict.checked["charges told to clients"] += 1
            twice = evidence.forked and call.told_micros != charged
            paid = charged + row["absorbed"] if twice else charged
            verdict.checked["charges of credit that was sold twice"] += twice
            verdict.equal(f"{name}: charge told to its client", call.told_micros, paid)
    if state == "void":
        verdict.equal(f"{name}: charge", charged, 0)
        verdict.expect(not (call and call.text), f"{name}: its client had read content")
        return
    answered = max(
        (one for one in entries if one["prompt_tokens"]), key=lambda one: int(one["started_ms"]), default=None
    )
    if answered is None:
        verdict.equal(f"{name}: charge for what no provider served", charged, 0)
        return
    _check_charge(name, row, answered, call, evidence, verdict)


def _check_charge(
    name: str, row: Document, entry: Document, call: Call | None, evidence: Evidence, verdict: ChaosVerdict
) -> None:
    state, charged, due = row["outcome"], row["charged"], row["charged"] + row["absorbed"]
    prompt, served = entry["prompt_tokens"], entry["served_tokens"]
    delivered = call.text if call is not None else ""
    if state == "completed":
        whole = _usage(entry) if row.get("source") == "provider" else prompt + entry["completion_tokens"]
        verdict.equal(f"{name}: charge", due, whole)
        return
    verdict.at_most(f"{name}: charge, against the provider's log", charged, prompt + served)
    if state == "swept":
        unbilled = max(0, prompt * bool(delivered) + count(delivered) - charged)
        beyond = max(0, unbilled - prompt)
        verdict.unbilled_max = max(verdict.unbilled_max, beyond)
        bound = evidence.unbilled_bound
        verdict.expect(bound is None or beyond <= bound, f"{name}: {beyond} tokens were delivered and not charged")
        return
    output = due - prompt
    verdict.expect(
        between(delivered, output, entry["text"], served) or (not delivered and due == 0),
        f"{name}: {output} tokens charged, {count(delivered)} delivered, {served} served",
    )


def _usage(entry: Document) -> int:
    """What the provider reported: the tokens that a completed answer costs."""
    usage = entry["usage_sent"] or {}
    return int(usage.get("prompt_tokens", 0)) + int(usage.get("completion_tokens", 0))


def check_account(state: AccountState, verdict: ChaosVerdict) -> None:
    """One account at rest: nothing held, and what was issued is there or was charged."""
    verdict.checked["accounts"] += 1
    verdict.equal(f"{state.name}: held", state.held, 0)
    verdict.same(f"{state.name}: open sessions", state.open_sessions, 0)
    verdict.equal(f"{state.name}: debt", state.debt, 0)
    verdict.equal(f"{state.name}: charged in Redis, against Postgres", state.charged, state.charged_rows)
    verdict.equal(f"{state.name}: consumed of its grants", state.consumed, state.charged_rows)
    verdict.equal(f"{state.name}: available", state.available, state.issued - state.charged_rows - state.expired_rows)


def check_grant(state: GrantState, verdict: ChaosVerdict) -> None:
    """One grant at rest: every micro of it is in one place, the same in both stores; once its time is over nothing of
    it can be spent, and what was not spent is breakage."""
    name = f"grant {state.id}"
    verdict.checked["grants over" if state.over else "grants"] += 1
    placed = state.available + state.held + state.consumed + state.expired + state.voided
    verdict.equal(f"{name}: available, held, consumed, expired and voided", placed, state.issued)
    verdict.equal(f"{name}: held", state.held, 0)
    verdict.equal(f"{name}: issued", state.issued, state.issued_rows)
    verdict.equal(f"{name}: consumed in Redis, against Postgres", state.consumed, state.consumed_rows)
    verdict.equal(f"{name}: expired in Redis, against Postgres", state.expired, state.expired_rows)
    verdict.equal(f"{name}: voided in Redis, against Postgres", state.voided, state.voided_rows)
    if state.over:
        verdict.equal(f"{name}: available after its time", state.available, 0)
        rest = state.issued_rows - state.consumed_rows - state.voided_rows
        verdict.equal(f"{name}: breakage", state.expired_rows, rest)


def check_audit(report: Document, verdict: ChaosVerdict) -> None:
    """`tollgate audit --json`: the invariants inside and across the stores."""
    verdict.checked["accounts audited"] += report["accounts"]
    for one in report["differences"]:
        verdict.micros += int(one["micros"] or 0)
        verdict.expect(False, f"audit: {one['account']} {one['what']}: {one['redis']} / {one['postgres']}")
    verdict.same("audit: grants that wait", list(report["pending_grants"]), [])
