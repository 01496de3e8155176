"""The check after a load: what clients were told, what the provider logged, and what the ledger holds must agree.

Prices are one micro a token, so a charge is compared with the provider's log to the token. Pure: it is given sessions
and balances as `tollgate ... --json` prints them, lines of the provider's and of the clients' logs, and key names.
Must not: talk to anything, import the gateway, or tolerate a difference of one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.simulated_provider.text import count

Document = Mapping[str, Any]
SESSION_KEPT_MS = 86_400_000
"""How long Redis remembers a finished session."""

SHOWN_MAX = 20
_ALLOWED = {
    # what the client saw -> how the session may have ended
    "completed": {"completed"},
    "broken": {"error"},
    "aborted": {"aborted", "completed", "void", "error"},
    "failed": {"aborted", "error", "void"},
    "refused": {"void"},
}


@dataclass(slots=True)
class Verdict:
    """What was compared (`checked`, by name) and what was wrong (`findings`, one line each)."""

    checked: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def expect(self, holds: bool, what: str) -> None:
        """Note a finding unless it holds."""
        if not holds:
            self.findings.append(what)

    def same(self, what: str, found: object, expected: object) -> None:
        """Note a finding unless both are equal."""
        self.expect(found == expected, f"{what}: {found}, expected {expected}")

    def shown(self) -> str:
        """A few lines for people."""
        lines = [f"  {number:>8}  {what}" for what, number in self.checked.items()]
        lines += [f"  WRONG: {finding}" for finding in self.findings[:SHOWN_MAX]]
        more = len(self.findings) - SHOWN_MAX
        return "\n".join([*lines, *([f"  ... and {more} more"] if more > 0 else [])])


def check_sessions(
    sessions: Sequence[Document], served: Iterable[Document], calls: Iterable[Document], verdict: Verdict
) -> None:
    """Every session against the provider's log and against what its client saw; nothing served without a session.

    `sessions` are `sessions list --json`'s, `served` the provider's log lines, `calls` the clients' log lines.
    """
    exchanges: dict[str, list[Document]] = defaultdict(list)
    for entry in served:
        exchanges[entry["request_id"]].append(entry)
    clients = {call["session"]: call for call in calls if call["session"]}
    for row in sessions:
        verdict.checked[f"sessions {row['state']}"] += 1
        tried = exchanges.pop(row["metadata"]["request_id"], []) if row["state"] != "running" else []
        _check_session(
            row, max(tried, key=lambda entry: int(entry["n"]), default=None), clients.get(row["id"]), verdict
        )
    for request_id in exchanges:
        verdict.expect(False, f"request {request_id} was sent to the provider and has no session")
    known = {row["id"] for row in sessions}
    verdict.same("sessions that clients know and the ledger does not", sorted(clients.keys() - known), [])


def _check_session(row: Document, entry: Document | None, call: Document | None, verdict: Verdict) -> None:
    name, state, charged = f"session {row['id']} ({row['state']})", row["state"], row["charged_micros"]
    verdict.same(f"{name}: absorbed", row.get("absorbed_micros", 0), 0)
    if call is not None:
        verdict.checked["sessions with their client's own record"] += 1
        verdict.expect(state in _ALLOWED[call["ending"]], f"{name}: its client saw '{call['ending']}'")
    if state == "void":
        verdict.same(f"{name}: charge", charged, 0)
        verdict.expect(not (call and call["text"]), f"{name}: its client had read content")
    elif entry is None:
        verdict.expect(False, f"{name}: the provider's log does not know request {row['metadata']['request_id']}")
    elif state == "completed":
        _check_completed(name, row, entry, call, verdict)
    elif state == "error":
        verdict.same(f"{name}: charge", charged, entry["prompt_tokens"] + entry["served_tokens"])
    elif state == "aborted":
        _check_aborted(name, row, entry, call, verdict)
    else:
        verdict.expect(False, f"{name}: no ending that this load can lead to")


def _check_completed(name: str, row: Document, entry: Document, call: Document | None, verdict: Verdict) -> None:
    verdict.same(f"{name}: charge", row["charged_micros"], entry["prompt_tokens"] + entry["completion_tokens"])
    if call is not None and call["told_micros"] is not None:
        verdict.checked["charges told to clients"] += 1
        verdict.same(f"{name}: charge told to its client", call["told_micros"], row["charged_micros"])


def _check_aborted(name: str, row: Document, entry: Document, call: Document | None, verdict: Verdict) -> None:
    output, delivered = row["charged_micros"] - entry["prompt_tokens"], call["text"] if call else ""
    verdict.expect(
        between(delivered, output, entry["text"], entry["served_tokens"]),
        f"{name}: {output} tokens charged, {count(delivered)} delivered, {entry['served_tokens']} served",
    )


def between(delivered: str, output: int, served: str, served_tokens: int) -> bool:
    """Whether `output` tokens are what some part of `served` counts that holds all of `delivered`.

    Of a longer text the tokenizer may make fewer tokens, so where the two ends do not enclose `output`, each cut
    between them is counted.
    """
    if not served.startswith(delivered):
        return False
    if count(delivered) <= output <= served_tokens:
        return True
    return any(count(served[:end]) == output for end in range(len(delivered), len(served) + 1))


def check_account(name: str, shown: Document, sessions: Iterable[Document], verdict: Verdict) -> None:
    """One account: nothing held, and the charges in Postgres are what Redis took from its grants.

    `shown` is `credits show --json`'s; the grants must be large enough not to be used up (a used up one is not shown).
    """
    balance, grants = shown["balance"], shown["grants"]
    charged = sum(row["charged_micros"] for row in sessions)
    verdict.checked["accounts"] += 1
    verdict.checked["micros charged"] += charged
    verdict.same(f"{name}: held micros", balance["held_micros"], 0)
    verdict.same(f"{name}: open sessions", balance["open_sessions"], 0)
    verdict.same(f"{name}: debt", balance["debt_micros"], 0)
    verdict.same(f"{name}: charged in Redis, against Postgres", balance["charged_micros"], charged)
    verdict.same(f"{name}: consumed of its grants", sum(grant["consumed_micros"] for grant in grants), charged)
    left = sum(grant["issued_micros"] for grant in grants) - charged
    verdict.same(f"{name}: available", balance["available_micros"], left)


def check_keys(before: Iterable[str], after: Mapping[str, int], finished: int, verdict: Verdict) -> None:
    """Redis' keys: new ones are records of finished sessions, one each, that expire within 24 hours.

    `before` are the names before the load, `after` names with their time to live in ms (-1: none), `finished` the
    sessions that ended in between.
    """
    new = {name: ttl for name, ttl in after.items() if name not in set(before)}
    records = {name: ttl for name, ttl in new.items() if name.startswith("s:")}
    verdict.checked["new keys in Redis"] += len(new)
    verdict.same("new keys in Redis that are no session's record", sorted(new.keys() - records.keys())[:5], [])
    lasting = sorted(name for name, ttl in records.items() if not 0 < ttl <= SESSION_KEPT_MS)
    verdict.same("session records in Redis that outlive a day", lasting[:5], [])
    verdict.same("session records in Redis", len(records), finished)
