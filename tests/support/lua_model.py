"""What the ledger means, in Python's integers: the model that random histories of the real scripts are held against.

Sessions are here, grants and policies in `lua_model_credit`, the account's figures in `lua_model_books`. Must not:
know a script or a key.
"""

from __future__ import annotations

from metering.ledger import (
    Corrected,
    Gone,
    Held,
    HoldRequest,
    NotCorrected,
    Outcome,
    Progressed,
    Refused,
    Repeated,
    SessionRef,
    Settled,
)
from tests.support.lua_model_books import Session
from tests.support.lua_model_credit import Credit

LEASE_MS = 15_000
MINUTE_MS = 60_000
HOUR_MS = 3_600_000
FORGETS = 16
"""How many admissions that no window asks for any more are dropped at a time."""


class Model(Credit):
    """One account with its sessions, all of one API key."""

    def __init__(self) -> None:
        super().__init__()
        self.admissions: list[int] = []
        self.forgotten = 0
        self.keyed: dict[str, tuple[str, str]] = {}

    def limits(self) -> dict[str, int]:
        """The key's hash: open sessions, admissions under a rate, and the times that a window may still ask for."""
        kept = {f"w{j}": time for j, time in enumerate(self.admissions) if j >= self.forgotten}
        rates = {"q": len(self.admissions), "lo": self.forgotten} if self.admissions else {}
        return {"p": len(self.open())} | rates | kept

    # --- reserve

    def reserve(self, asked: HoldRequest) -> Held | Refused | Repeated:
        """Hold credit and admit a session; a refusal stores nothing."""
        past = self._past(asked) or self._barred(asked)
        if past is not None:
            return past
        taken = self.plan(asked.want)
        got = sum(taken.values())
        line = min(self.room, asked.want - got)
        whole = got + line
        if whole < asked.minimum:
            if whole + self.held >= asked.minimum:
                return Refused("in_flight", whole, self.held, 1_000)
            return Refused("balance", whole, self.held)
        self.write()
        session = Session("H", fence=self.now, lease=self.now + LEASE_MS, body=asked.body_hash)
        self.hold(session, taken, line)
        self.sessions[asked.session] = session
        if asked.idempotency:
            self.keyed[asked.idempotency] = (asked.session, asked.body_hash)
        rate = asked.limits.requests_per_minute
        if rate is not None:
            self.forgotten = max(self.forgotten, min(len(self.admissions) - rate + 1, self.forgotten + FORGETS))
            self.admissions.append(self.now)
        return Held(whole, self.available, self.now, LEASE_MS)

    def _refused(self, reason: str, retry_after_ms: int = 0) -> Refused:
        return Refused(reason, self.available, self.held, retry_after_ms)  # type: ignore[arg-type]

    def _past(self, asked: HoldRequest) -> Held | Refused | Repeated | None:
        """What the session's own past answers, or its idempotency key's."""
        past = self.sessions.get(asked.session)
        if past is not None and past.state != "H":
            return self._refused("tombstone" if past.state == "V" else "finished")
        if past is not None:
            if past.body != asked.body_hash:
                return self._refused("conflict")
            return Held(past.hold, self.available, past.fence, max(0, past.lease - self.now), repeated=True)
        by, body = self.keyed.get(asked.idempotency, ("", ""))
        if by and body != asked.body_hash:
            return Repeated(by, same_body=False)
        return Repeated(by, same_body=True) if by and by != asked.past else None

    def _barred(self, asked: HoldRequest) -> Refused | None:
        """Why the account, or the key's limits, begin nothing now."""
        if self.blocked:
            return self._refused("blocked")
        if self.debt and not self.room:
            return self._refused("debt")
        rate, parallel = asked.limits.requests_per_minute, asked.limits.parallel_sessions
        if rate == 0:
            return self._refused("requests")
        if rate is not None and len(self.admissions) >= rate:
            frees = self.admissions[-rate] + MINUTE_MS
            if frees > self.now:
                return self._refused("requests", frees - self.now)
        if parallel is not None and len(self.open()) >= parallel:
            return self._refused("parallel", 1_000)
        return None

    # --- a session's life

    def progress(self, ref: SessionRef, q: int, metered: int, want: int) -> Progressed | Gone:
        """A checkpoint: counts when it is newer, renews also when it is a repeat, extends the hold."""
        session = self.sessions.get(ref.session)
        if session is None or session.state == "V":
            return Gone("unknown")
        if ref.fence != session.fence:
            return Gone("fenced")
        if session.state == "T":
            return Gone("final", session.charged)
        if not (q > session.q and metered >= session.metered) and (q, metered) != (session.q, session.metered):
            return Progressed(session.hold, self.available, applied=False)
        self.write()
        session.q, session.metered, session.lease = q, metered, self.now + LEASE_MS
        need = 0 if self.blocked else max(0, want - session.hold)
        taken = self.plan(need)
        self.hold(session, taken, min(self.room, need - sum(taken.values())))
        return Progressed(session.hold, self.available)

    def reassert(self, ref: SessionRef, q: int, metered: int, want: int) -> list[str]:
        """A hold is made anew, from what was spendable at its fence: the verb's answer, word by word."""
        past = self.sessions.get(ref.session)
        if past is not None and past.state == "V":
            return ["TOMBSTONE"]
        if past is not None and past.state == "T":
            return ["FINAL", str(past.charged)]
        if past is not None:
            return ["EXISTS", str(past.hold), str(self.available)]
        taken = self.plan(want, min(self.now, ref.fence))
        line = min(self.room, want - sum(taken.values()))
        self.write()
        session = Session("H", fence=ref.fence, lease=self.now + LEASE_MS, q=q, metered=metered, body="hash")
        self.hold(session, taken, line)
        self.sessions[ref.session] = session
        return ["HELD", str(session.hold), str(self.available)]

    # --- its end

    def end(self, session: Session, charge: int, outcome: Outcome) -> Settled:
        """Held slices pay, then available grants, then the line's held part and its room, as debt, then the house."""
        room = self.room
        session.cover = session.hold + self.spendable if self.policy == "cutoff" else None
        left = charge
        for gid, amount in session.slices.items():
            spent = min(amount, left)
            left -= spent
            self.grants[gid].h -= amount
            self.grants[gid].c += spent
            self.give_back(gid, amount - spent)
        left -= self.spend(left)
        owing = min(left, session.line + room)
        left -= owing
        self.debt += owing
        self.charged += charge - left
        session.state, session.slices, session.line = "T", {}, 0
        session.entry, session.outcome, session.ended = self.journal(), outcome, self.now
        session.due, session.charged, session.absorbed, session.debt = charge, charge - left, left, owing
        return Settled(session.charged, left, self.available, session.entry)

    def repeat(self, session: Session) -> Settled:
        """What a second ending of a session answers."""
        return Settled(session.charged, session.absorbed, self.available, session.entry, repeated=True)

    def settle(self, ref: SessionRef, charge: int, outcome: Outcome) -> Settled | Gone:
        """The owner's end of a session."""
        session = self.sessions.get(ref.session)
        if session is None or session.state == "V":
            return Gone("unknown")
        if ref.fence != session.fence:
            return Gone("fenced")
        if session.state == "T":
            return Gone("final", session.charged) if session.outcome == "swept" else self.repeat(session)
        return self.end(session, charge, outcome)

    def void(self, ref: SessionRef) -> Settled | Gone:
        """The end that charges nothing; a session that never was gets a tombstone."""
        session = self.sessions.get(ref.session)
        if session is None:
            self.write()
            session = self.sessions[ref.session] = Session("V")
        if session.state == "V":
            return Gone("unknown")
        unknown_owner = (session.state == "H" and session.q == 0) or session.outcome == "void"
        if ref.fence != session.fence and not (ref.fence == 0 and unknown_owner):
            return Gone("fenced")
        if session.state == "T":
            return self.repeat(session) if session.outcome == "void" else Gone("final", session.charged)
        return self.end(session, 0, "void")

    def sweep_due(self) -> list[tuple[str, int, int, int]]:
        """What the sweeper ends: (session, charged, absorbed, entry), the lease that ended first first."""
        due = sorted((one.lease, f"acc|{sid}", sid) for sid, one in self.open().items() if one.lease <= self.now)
        ended = [(sid, self.end(self.sessions[sid], self.sessions[sid].metered, "swept")) for _, _, sid in due]
        return [(sid, one.charged, one.absorbed, one.entry) for sid, one in ended]

    def sweep(self, sid: str) -> list[str]:
        """The sweep of one session, due or not: the verb's answer, word by word."""
        session = self.sessions.get(sid)
        if session is None or session.state == "V":
            return ["UNKNOWN"]
        if session.state == "T":
            figures = (session.charged, session.absorbed, self.available, session.entry, session.outcome)
            return ["FINAL", *map(str, figures)]
        if session.lease > self.now:
            return ["NOTDUE", str(session.lease - self.now)]
        end = self.end(session, session.metered, "swept")
        return ["SETTLED", *map(str, (end.charged, end.absorbed, end.available, end.entry))]

    def correct(self, ref: SessionRef, charge: int) -> Corrected | NotCorrected:
        """A swept session's owner says what it came to: upward, once, within the hour."""
        session = self.sessions.get(ref.session)
        if session is None or session.state == "V":
            return NotCorrected("unknown")
        if ref.fence != session.fence:
            return NotCorrected("fenced")
        if session.state == "H" or session.outcome != "swept":
            return NotCorrected("open" if session.state == "H" else "ended")
        if session.correction is not None:
            first = session.correction
            return Corrected(first.charged, first.absorbed, self.available, first.entry, repeated=True)
        due = charge - session.charged - session.absorbed
        if due <= 0:
            return NotCorrected("lower")
        if self.now - session.ended > HOUR_MS:
            return NotCorrected("late")
        if session.cover is not None:
            session.cover = session.cover + self.spendable if self.policy == "cutoff" else None
        room, left = self.room, due - self.spend(due)
        owing = min(left, room)
        left -= owing
        self.debt += owing
        self.charged += due - left
        session.due, session.charged = charge, session.charged + due - left
        session.absorbed, session.debt = session.absorbed + left, session.debt + owing
        session.correction = Corrected(due - left, left, self.available, self.journal())
        return session.correction
