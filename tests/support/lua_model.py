"""What the ledger means, in Python's integers: the model that random histories of the real scripts are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

from metering.ledger import (
    ChangeRefused,
    Gone,
    Granted,
    GrantRefused,
    Held,
    Progressed,
    Refused,
    Settled,
    Voided,
)
from tests.support.valkey import WALL

LEASE_MS = 15_000
SLOTS = 3


@dataclass
class Grant:
    """i = a + h + c + x + v. `listed`: its credit can still be spent by a new hold."""

    order: tuple[int, int, int, str]
    issued: int
    a: int
    expires: int
    h: int = 0
    c: int = 0
    x: int = 0
    v: int = 0
    listed: bool = True
    revoked: bool = False
    revocation: Voided | None = None

    def live(self, now: int) -> bool:
        return self.expires == 0 or self.expires > now


@dataclass
class Session:
    state: str
    slices: dict[str, int] = field(default_factory=dict)
    fence: int = 0
    lease: int = 0
    q: int = 0
    metered: int = 0
    charged: int = 0
    absorbed: int = 0
    entry: int = 0
    outcome: str = ""

    @property
    def hold(self) -> int:
        return sum(self.slices.values())


class Model:
    """What the ledger means, in Python's integers."""

    def __init__(self) -> None:
        self.now = WALL
        self.grants: dict[str, Grant] = {}
        self.sessions: dict[str, Session] = {}
        self.n = 0
        self.charged = 0
        self.issued: dict[str, Granted] = {}
        self.early: dict[str, Voided] = {}
        self.changes: dict[str, tuple[int, bool, Voided]] = {}

    @property
    def available(self) -> int:
        return sum(grant.a for grant in self.grants.values())

    @property
    def held(self) -> int:
        return sum(session.hold for session in self.open().values())

    def open(self) -> dict[str, Session]:
        return {sid: session for sid, session in self.sessions.items() if session.state == "H"}

    def grant(self, gid: str, amount: int, priority: int, expires: int) -> Granted | GrantRefused:
        if amount == 0:
            return GrantRefused("bounds")
        grant, first = self.grants.get(gid), self.issued.get(gid)
        if grant is not None and first is not None:
            if (grant.issued, grant.expires) != (amount, expires):
                return GrantRefused("conflict")
            return Granted(self.available, first.entry, 0, repeated=True)
        if gid in self.early:
            return GrantRefused("revoked")
        self.n += 1
        self.grants[gid] = Grant((priority, expires or 10**15 - 1, self.now, gid), amount, amount, expires)
        self.issued[gid] = Granted(self.available, self.n, 0)
        return self.issued[gid]

    def expire(self) -> list[tuple[str, int, int]]:
        """What the expirer moves: (grant, amount, entry), in the order of their ends."""
        over = [(g.expires, gid) for gid, g in self.grants.items() if g.listed and not g.live(self.now)]
        moved = []
        for _, gid in sorted(over):
            grant = self.grants[gid]
            if grant.a:
                self.n += 1
                moved.append((gid, grant.a, self.n))
            grant.x, grant.a, grant.listed = grant.x + grant.a, 0, False
        return moved

    def revoke(self, gid: str) -> Voided:
        grant = self.grants.get(gid)
        past = self.early.get(gid) if grant is None else grant.revocation
        if past is not None:
            return Voided(past.amount, self.available, past.entry, repeated=True)
        self.n += 1
        if grant is None:
            self.early[gid] = Voided(0, self.available, self.n)
            return self.early[gid]
        amount, grant.a, grant.v = grant.a, 0, grant.v + grant.a
        grant.listed, grant.revoked = False, True
        grant.revocation = Voided(amount, self.available, self.n)
        return grant.revocation

    def adjust(self, change: str, amount: int, whole: bool) -> Voided | ChangeRefused:
        if amount == 0:
            return ChangeRefused("bounds")
        if change in self.changes:
            *same, first = self.changes[change]
            if same != [amount, whole]:
                return ChangeRefused("conflict")
            return Voided(first.amount, self.available, first.entry, repeated=True)
        taken = self.take(amount)
        if whole and sum(taken.values()) < amount:
            taken = {}
        for gid, part in taken.items():
            self.grants[gid].a -= part
            self.grants[gid].v += part
        self.n += 1
        self.changes[change] = (amount, whole, Voided(sum(taken.values()), self.available, self.n))
        return self.changes[change][2]

    def burn_order(self) -> list[str]:
        ordered = sorted(self.grants.items(), key=lambda pair: pair[1].order)
        return [gid for gid, grant in ordered if grant.listed and (grant.a or grant.h)]

    def take(self, need: int) -> dict[str, int]:
        """What the grants in burn order would give."""
        out: dict[str, int] = {}
        for gid, grant in sorted(self.grants.items(), key=lambda pair: pair[1].order):
            give = min(grant.a, need - sum(out.values())) if grant.live(self.now) else 0
            if give > 0:
                out[gid] = give
        return out

    def hold(self, session: Session, taken: dict[str, int]) -> None:
        for gid, amount in taken.items():
            self.grants[gid].a -= amount
            self.grants[gid].h += amount
            session.slices[gid] = session.slices.get(gid, 0) + amount

    def reserve(self, sid: str, want: int, minimum: int) -> Held | Refused:
        past = self.sessions.get(sid)
        if past is not None and past.state == "H":
            return Held(past.hold, self.available, past.fence, max(0, past.lease - self.now), repeated=True)
        if past is not None:
            return Refused("tombstone" if past.state == "V" else "finished", self.available, self.held)
        if len(self.open()) >= SLOTS:
            return Refused("parallel", self.available, self.held, 1_000)
        taken = self.take(want)
        got = sum(taken.values())
        if got < minimum:
            in_flight = got + self.held >= minimum
            return Refused("in_flight" if in_flight else "balance", got, self.held, 1_000 if in_flight else 0)
        session = self.sessions[sid] = Session("H", fence=self.now, lease=self.now + LEASE_MS)
        self.hold(session, taken)
        return Held(got, self.available, self.now, LEASE_MS)

    def progress(self, sid: str, q: int, metered: int, want: int) -> Progressed | Gone:
        session = self.sessions.get(sid)
        if session is None or session.state == "V":
            return Gone("unknown")
        if session.state == "T":
            return Gone("final", session.charged)
        if not (q > session.q and metered >= session.metered) and (q, metered) != (session.q, session.metered):
            return Progressed(session.hold, self.available, applied=False)
        session.q, session.metered, session.lease = q, metered, self.now + LEASE_MS
        self.hold(session, self.take(max(0, want - session.hold)))
        return Progressed(session.hold, self.available)

    def end(self, session: Session, charge: int, outcome: str) -> Settled:
        left = charge
        for gid, amount in session.slices.items():
            grant, spent = self.grants[gid], min(amount, left)
            left -= spent
            grant.h -= amount
            grant.c += spent
            if grant.revoked:
                grant.v += amount - spent
            elif grant.live(self.now):
                grant.a += amount - spent
            else:
                grant.x += amount - spent
        for gid, amount in self.take(left).items():
            self.grants[gid].a -= amount
            self.grants[gid].c += amount
            left -= amount
        self.n += 1
        self.charged += charge - left
        session.state, session.slices, session.entry, session.outcome = "T", {}, self.n, outcome
        session.charged, session.absorbed = charge - left, left
        return Settled(session.charged, left, self.available, self.n)

    def repeat(self, session: Session) -> Settled:
        return Settled(session.charged, session.absorbed, self.available, session.entry, repeated=True)

    def settle(self, sid: str, charge: int) -> Settled | Gone:
        session = self.sessions.get(sid)
        if session is None or session.state == "V":
            return Gone("unknown")
        if session.state == "T":
            return Gone("final", session.charged) if session.outcome == "swept" else self.repeat(session)
        return self.end(session, charge, "completed")

    def void(self, sid: str) -> Settled | Gone:
        session = self.sessions.setdefault(sid, Session("V"))
        if session.state == "V":
            return Gone("unknown")
        if session.state == "T":
            return self.repeat(session) if session.outcome == "void" else Gone("final", session.charged)
        return self.end(session, 0, "void")
