"""Random histories on a real server: what their rules share, and the rules on credit, policies and time.

The rules on sessions, and the machine, are in `lua_model_machine`. Must not: repeat a rule of the ledger (the model
does).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metering.ledger import MICROS_MAX, GrantRequest, LedgerError, Policy, PolicyChange, SessionRef
from metering.ledger_policies import PolicyConflict
from metering.scripts import Script
from storage.redis_client import RedisClient
from tests.support.lua_model import HOUR_MS, LEASE_MS, MINUTE_MS, Model
from tests.support.lua_model_checks import Seen, check, look
from tests.support.lua_scenarios import fresh
from tests.support.valkey import SHARD, Stand

T = TypeVar("T")
ABSURD = 10**15
SMALL = st.integers(0, 120)
AMOUNTS = SMALL | st.integers(0, 400) | st.sampled_from([1, ABSURD, 10**14])
LIMITS = st.sampled_from([0, 0, 100, 400, 1_000, ABSURD])
WHICH = st.integers(0, 9)
"""Which of the sessions or grants there are; the last one more is one that is not known."""
GIDS = st.integers(0, 7).map(lambda n: f"g{n}")
LIVES = st.sampled_from([0, 0, 5, 50, 1_000, 14_000, 20_000, -5])
"""How long a grant lives in ms; 0 for ever, below 0 when it came too late."""
OVERS = st.sampled_from([-1, 0, 1])


class Rig:
    """One event loop, one connected client and one set of scripts for all histories of a run."""

    def __init__(self, runner: asyncio.Runner, client: RedisClient, loaded: dict[str, Script]) -> None:
        self.loop = runner.get_loop()
        self.client = client
        self.loaded = loaded
        self.reached: Counter[str] = Counter()


def words(reply: list[Any]) -> list[str]:
    """A script's own reply, each part as text."""
    return [part.decode() if isinstance(part, bytes) else str(part) for part in reply]


def kind_of(answer: Any) -> str:
    """An answer without its figures: what `reached` counts."""
    if isinstance(answer, list):
        return str(answer[0])
    if isinstance(answer, str):
        return answer
    names = ("reason", "state", "repeated", "applied", "same_body")
    parts = (getattr(answer, name, None) for name in names)
    return " ".join([type(answer).__name__, *(str(part) for part in parts if part is not None)])


class Bench(RuleBasedStateMachine):
    """What the rules share: the server, the model, and their comparison after each step."""

    rig: ClassVar[Rig]

    def __init__(self) -> None:
        super().__init__()
        self.stand: Stand = self.run(fresh(self.rig.client, self.rig.loaded))
        self.ledger = self.stand.ledger
        self.model = Model()
        self.seen: Seen | None = None
        self.checked = False

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.rig.loop.run_until_complete(call)  # a Runner would set signal handlers, twice a step

    def same(self, verb: str, answer: Any, expected: Any) -> None:
        """The verb's answer is the model's, and so is everything after it."""
        self.rig.reached[f"{verb}: {kind_of(expected)}"] += 1
        assert answer == expected, verb
        self.check()

    def ref(self, sid: str, fence: str = "own") -> SessionRef:
        session = self.model.sessions.get(sid)
        own = session.fence if session else 1
        return SessionRef(sid, self.stand.account, "key", {"own": own, "none": 0, "another": own + 1}[fence])

    def wall(self, ms: int) -> None:
        self.model.wall, self.checked = ms, False
        self.run(self.stand.wall(ms))

    def sid(self, which: int) -> str:
        """A session by its number, the number after the last for one that is not known."""
        return f"n{which % (len(self.model.sessions) + 1)}"

    def gid(self, which: int) -> str:
        """A grant, or one that is not known."""
        gids = [*sorted(self.model.grants), f"g{which % 8}"]
        return gids[which % len(gids)]

    @property
    def everything(self) -> int:
        """Micros that a hold could be given now."""
        return self.model.spendable + self.model.room

    @invariant()
    def the_ledger_is_the_model_and_adds_up(self) -> None:
        if not self.checked:
            self.check()

    def check(self) -> None:
        """Every invariant: after each verb, also where a rule makes several calls, and after each move of the clock."""
        seen = self.run(look(self.stand))
        check(seen, self.seen, self.model)
        for _, fields in seen.entries[len(self.seen.entries) if self.seen else 0 :]:
            with_what = " ".join(
                name for name in ("d", "ab", "br", "vd", "rp") if fields.get(name, "0") not in ("", "0")
            )
            self.rig.reached[f"journal: {fields['t']} {with_what}".rstrip()] += 1
        balance = seen.snapshot.balance
        self.rig.reached["account: owes more than its limit"] += balance.debt + balance.line > balance.limit
        self.seen, self.checked = seen, True


class CreditRules(Bench):
    """Grants, their ends, adjustments, policies, time."""

    @initialize(limit=LIMITS, lives=LIVES)
    def begin_with_credit(self, limit: int, lives: int) -> None:
        self.issue("g0", 1_000 if limit == 0 else 300, 50, 0)
        self.issue("g1", 150, 1, lives)
        if limit:
            self.change_policy("grace", limit, 1)

    @rule(gid=GIDS, amount=AMOUNTS, priority=st.sampled_from([1, 50]), lives=LIVES)
    def grant(self, gid: str, amount: int, priority: int, lives: int) -> None:
        self.issue(gid, amount, priority, lives)

    @rule(amount=st.integers(1, 150), priority=st.sampled_from([1, 50]), lives=st.sampled_from([50, 1_000, 14_000]))
    def grant_a_little(self, amount: int, priority: int, lives: int) -> None:
        self.issue(f"g{len(self.model.grants)}", amount, priority, lives)

    @rule(gid=GIDS, over=st.sampled_from([-1, 0, 1, 50]))
    @precondition(lambda self: self.model.debt)
    def grant_about_the_debt(self, gid: str, over: int) -> None:
        self.issue(gid, self.model.debt + over, 50, 20_000)

    @rule(over=OVERS)
    @precondition(lambda self: self.model.n > 15)
    def grant_what_can_be_counted(self, over: int) -> None:
        """Late in a history, since nothing is scarce after it."""
        sum_now = self.model.available + self.model.held + self.model.charged
        self.issue(f"g{len(self.model.grants)}", max(0, MICROS_MAX - sum_now + over), 50, 20_000)

    def issue(self, gid: str, amount: int, priority: int, lives: int) -> None:
        now = self.model.now
        asked = GrantRequest(gid, self.stand.account, amount, priority, now + lives if lives else 0, now)
        self.same("grant", self.run(self.ledger.grant(asked)), self.model.grant(asked))

    @rule(which=WHICH)
    def grant_again(self, which: int) -> None:
        gid = self.gid(which)
        if gid in self.model.grants:
            one = self.model.grants[gid]
            asked = GrantRequest(gid, self.stand.account, one.issued, one.order[0], one.expires, one.order[2])
            self.same("grant", self.run(self.ledger.grant(asked)), self.model.grant(asked))

    @rule()
    def expire_due(self) -> None:
        due, expired = self.run(self.ledger.expire_due(SHARD, 50))
        moved = [(one.grant, one.amount, one.entry) for one in expired]
        expected = self.model.expire_due()
        self.rig.reached["expire: due"] += expected[0]
        assert (due, moved) == expected
        self.check()

    @rule(which=WHICH)
    def expire(self, which: int) -> None:
        ending = sorted(gid for gid, grant in self.model.grants.items() if grant.expires)
        gid = ending[which % len(ending)] if ending and which else self.gid(which)
        self.same("expire", words(self.run(self.stand.run("expire", gid=gid))), self.model.expire(gid))

    @rule(which=WHICH)
    def revoke_any(self, which: int) -> None:
        self.revoke(self.gid(which))

    def revoke(self, gid: str) -> None:
        self.same("revoke", self.run(self.ledger.revoke(self.stand.account, gid)), self.model.revoke(gid))

    @rule(data=st.data())
    @precondition(lambda self: any(grant.h for grant in self.model.grants.values()))
    def revoke_what_is_held(self, data: st.DataObject) -> None:
        held = sorted(gid for gid, grant in self.model.grants.items() if grant.h)
        self.revoke(data.draw(st.sampled_from(held)))

    @rule(change=st.sampled_from(["j1", "j2", "g1"]), amount=AMOUNTS, whole=st.booleans())
    def take(self, change: str, amount: int, whole: bool) -> None:
        answer = self.run(self.ledger.take(self.stand.account, change, amount, whole=whole))
        self.same("take", answer, self.model.adjust(change, amount, whole))

    @rule(amount=SMALL, whole=st.booleans(), again=st.booleans())
    def take_a_little(self, amount: int, whole: bool, again: bool) -> None:
        change = f"k{self.model.n}"
        self.take(change, amount, whole)
        if again:
            self.take(change, amount, whole)

    @rule(over=OVERS, whole=st.booleans())
    @precondition(lambda self: self.model.spendable < 300)
    def take_at_a_boundary(self, over: int, whole: bool) -> None:
        self.take(f"k{self.model.n}", max(0, self.model.spendable + over), whole)

    @rule(policy=st.sampled_from(["grace", "postpaid", "cutoff"]), limit=LIMITS, step=st.sampled_from([1, 1, 0, 0, -1]))
    def policy(self, policy: Policy, limit: int, step: int) -> None:
        again = step == 0 and limit == 0
        policy, limit = (self.model.policy, self.model.limit) if again else (policy, limit)
        self.change_policy(policy, limit, self.model.revision + step)

    @rule(over=st.sampled_from([-1, 0, 1, 150]))
    def move_the_limit_to_what_is_owed(self, over: int) -> None:
        owed = self.model.debt + self.model.line + over
        self.change_policy("postpaid", max(0, owed), self.model.revision + 1)

    def change_policy(self, policy: Policy, limit: int, revision: int) -> None:
        answer: Any
        try:
            answer = self.run(self.ledger.set_policy(PolicyChange(self.stand.account, policy, limit, max(0, revision))))
        except PolicyConflict:
            answer = "conflict"
        except LedgerError as error:
            answer = "bounds" if "BOUNDS" in str(error) else error
        self.same("policy", answer, self.model.set_policy(policy, limit, max(0, revision)))

    @rule(ms=st.sampled_from([1, 50, 1_000, LEASE_MS, MINUTE_MS, -1_000, -LEASE_MS]))
    def tick(self, ms: int) -> None:
        self.wall(self.model.wall + ms)

    @rule(data=st.data(), offset=OVERS)
    def tick_to_a_boundary(self, data: st.DataObject, offset: int) -> None:
        model = self.model
        times = [g.expires for g in model.grants.values()] + [s.lease for s in model.open().values()]
        times += [one.ended + HOUR_MS for one in model.swept().values()] + [t + MINUTE_MS for t in model.admissions]
        ahead = sorted({time + offset for time in times if time + offset > model.now})
        if ahead:
            self.wall(data.draw(st.sampled_from(ahead)))
