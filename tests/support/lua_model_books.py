"""The figures of one account as the ledger's rules mean them, in Python's integers: clock, grants, sessions, line.

`lua_model_credit` and `lua_model` put the verbs on top. Must not: know a script, a key or a reply's words; the rules
stand in the design of the ledger (metering, sections 1.1 to 1.5) and are written down here a second time on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from metering.ledger import MICROS_MAX, Balance, Corrected, Outcome, Policy, SessionState, Voided
from tests.support.valkey import WALL

NEVER = 10**15 - 1
"""Where a grant without expiry stands in the burn order."""


@dataclass
class Grant:
    """i = a + h + c + x + v. `listed`: it has not expired or been revoked yet, as far as the ledger has noticed."""

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
        """Whether a new hold at `now` (ms) may take from it."""
        return self.expires == 0 or self.expires > now


@dataclass
class Session:
    """`state` H held, T ended, V tombstone. `due` is what was asked of it in all, `cover` what its hold and the
    account's available grants came to when it was charged, `debt` the part of its charge that became debt."""

    state: str
    slices: dict[str, int] = field(default_factory=dict)
    line: int = 0
    fence: int = 0
    lease: int = 0
    q: int = 0
    metered: int = 0
    body: str = ""
    outcome: Outcome | None = None
    charged: int = 0
    absorbed: int = 0
    debt: int = 0
    entry: int = 0
    ended: int = 0
    due: int = 0
    cover: int | None = None
    correction: Corrected | None = None

    @property
    def hold(self) -> int:
        """Micros held, on grants and on the credit line."""
        return sum(self.slices.values()) + self.line

    def open_state(self) -> SessionState:
        """A held session as the audit shows it."""
        return SessionState(self.hold, self.metered, self.slices, self.lease, self.line)


class Books:
    """One account in one shard. `wall` is the server's clock in ms, `saved` what the shard remembers of it."""

    def __init__(self) -> None:
        self.wall = self.saved = WALL
        self.grants: dict[str, Grant] = {}
        self.sessions: dict[str, Session] = {}
        self.n = 0
        self.debt = 0
        self.charged = 0
        self.policy: Policy = "cutoff"
        self.limit = 0
        self.blocked = False

    @property
    def now(self) -> int:
        """The shard's time: never behind what was written down."""
        return max(self.wall, self.saved)

    def write(self) -> None:
        """Something was written: the shard remembers its time."""
        self.saved = self.now

    def journal(self) -> int:
        """The number of one more entry."""
        self.write()
        self.n += 1
        return self.n

    @property
    def available(self) -> int:
        """Micros that nobody holds, also of grants whose end nobody noticed yet."""
        return sum(grant.a for grant in self.grants.values())

    @property
    def spendable(self) -> int:
        """Micros that a hold could take from grants now."""
        return sum(grant.a for grant in self.grants.values() if grant.live(self.now))

    @property
    def held(self) -> int:
        """Micros that sessions hold, on grants and on the line."""
        return sum(session.hold for session in self.open().values())

    @property
    def line(self) -> int:
        """Micros that sessions hold on the credit line."""
        return sum(session.line for session in self.open().values())

    @property
    def room(self) -> int:
        """Micros that the credit line has left; every sum of an account stays countable."""
        free = self.limit - self.line - self.debt
        return max(0, min(free, MICROS_MAX - self.available - self.held - self.charged))

    @property
    def balance(self) -> Balance:
        """The account as the ledger should show it."""
        return Balance(
            self.available, self.held, self.debt, self.charged, len(self.open()), self.line, self.limit, self.policy
        )

    def open(self) -> dict[str, Session]:
        """The sessions that hold."""
        return {sid: session for sid, session in self.sessions.items() if session.state == "H"}

    def ended(self) -> dict[str, Session]:
        """The sessions with a terminal entry."""
        return {sid: session for sid, session in self.sessions.items() if session.state == "T"}

    def swept(self) -> dict[str, Session]:
        """The sessions that ended by a sweep and were not corrected."""
        return {sid: one for sid, one in self.ended().items() if one.outcome == "swept" and one.correction is None}

    def burn_order(self) -> list[str]:
        """Grants that are open, in the order in which they pay."""
        ordered = sorted(self.grants.items(), key=lambda pair: pair[1].order)
        return [gid for gid, grant in ordered if grant.listed and (grant.a or grant.h)]

    def plan(self, need: int, at: int | None = None) -> dict[str, int]:
        """What the grants would give in burn order at `at`, now by default."""
        out: dict[str, int] = {}
        moment = self.now if at is None else at
        for gid, grant in sorted(self.grants.items(), key=lambda pair: pair[1].order):
            give = min(grant.a, need - sum(out.values())) if grant.live(moment) else 0
            if give > 0:
                out[gid] = give
        return out

    def hold(self, session: Session, taken: dict[str, int], line: int) -> None:
        """Available micros become a session's, and `line` micros of the credit line."""
        for gid, amount in taken.items():
            self.grants[gid].a -= amount
            self.grants[gid].h += amount
            session.slices[gid] = session.slices.get(gid, 0) + amount
        session.line += line

    def spend(self, need: int) -> int:
        """Up to `need` micros of available grants are consumed: how many."""
        taken = self.plan(need)
        for gid, amount in taken.items():
            self.grants[gid].a -= amount
            self.grants[gid].c += amount
        return sum(taken.values())

    def give_back(self, gid: str, amount: int) -> None:
        """The unspent rest of a slice, no longer held: voided, or repays debt and then returns, or breaks."""
        grant = self.grants[gid]
        if grant.revoked:
            grant.v += amount
            return
        repaid = min(amount, self.debt)
        self.debt -= repaid
        grant.c += repaid
        if grant.live(self.now):
            grant.a += amount - repaid
        else:
            grant.x += amount - repaid
