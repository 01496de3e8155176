"""The real scripts against a small model: random histories with an injected clock, every invariant after every step."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from metering.ledger import Gone, GrantRequest, KeyLimits, Refused, SessionRef
from tests.support.lua_model import LEASE_MS, SLOTS, Model
from tests.support.redis_server import RedisServer
from tests.support.valkey import SHARD, Stand, stand_on, valkey

AMOUNTS = st.integers(0, 400) | st.sampled_from([1, 10**15, 10**14])
SIDS = st.integers(0, 9).map(lambda n: f"n{n}")
GIDS = st.integers(0, 7).map(lambda n: f"g{n}")


class Rig:
    """One server and one event loop for all histories of the test."""

    def __init__(self, runner: asyncio.Runner, server: RedisServer) -> None:
        self.runner = runner
        self.server = server


class LedgerMachine(RuleBasedStateMachine):
    rig: Rig

    def __init__(self) -> None:
        super().__init__()
        self.context = stand_on(self.rig.server)
        self.stand: Stand = self.run(self.context.__aenter__())
        self.model = Model()

    def run(self, call: Any) -> Any:
        return self.rig.runner.run(call)

    def teardown(self) -> None:
        self.run(self.context.__aexit__(None, None, None))

    def ref(self, sid: str) -> SessionRef:
        session = self.model.sessions.get(sid)
        return SessionRef(sid, self.stand.account, "key", session.fence if session else 1)

    @rule(gid=GIDS, amount=AMOUNTS, priority=st.sampled_from([1, 50]), lives=st.sampled_from([0, 5, 1_000, 20_000]))
    def grant(self, gid: str, amount: int, priority: int, lives: int) -> None:
        now, account = self.model.now, self.stand.account
        expires = now + lives if lives else 0
        answer = self.run(self.stand.ledger.grant(GrantRequest(gid, account, amount, priority, expires, now)))
        assert answer == self.model.grant(gid, amount, priority, expires)

    @rule()
    def expire(self) -> None:
        _, expired = self.run(self.stand.ledger.expire_due(SHARD, 50))
        assert [(one.grant, one.amount, one.entry) for one in expired] == self.model.expire()

    @rule(gid=GIDS)
    def revoke(self, gid: str) -> None:
        assert self.run(self.stand.ledger.revoke(self.stand.account, gid)) == self.model.revoke(gid)

    @rule(data=st.data())
    @precondition(lambda self: any(grant.h for grant in self.model.grants.values()))
    def revoke_what_is_held(self, data: st.DataObject) -> None:
        held = sorted(gid for gid, grant in self.model.grants.items() if grant.h)
        self.revoke(data.draw(st.sampled_from(held)))

    @rule(change=st.sampled_from(["j1", "j2", "g1"]), amount=AMOUNTS, whole=st.booleans())
    def take(self, change: str, amount: int, whole: bool) -> None:
        answer = self.run(self.stand.ledger.take(self.stand.account, change, amount, whole=whole))
        assert answer == self.model.adjust(change, amount, whole)

    @rule(over=st.sampled_from([-1, 0, 1]), whole=st.booleans())
    def take_at_a_boundary(self, over: int, whole: bool) -> None:
        self.take(f"k{self.model.n}", max(0, sum(self.model.take(2**53).values()) + over), whole)

    @initialize()
    def begin_with_credit(self) -> None:
        self.grant("g0", 2_000, 50, 0)

    @rule(want=AMOUNTS, part=st.integers(0, 4))
    def reserve_anew(self, want: int, part: int) -> None:
        self.reserve(f"n{len(self.model.sessions)}", want, want * part // 4)

    @rule(over=st.sampled_from([0, 1]))
    def reserve_at_a_boundary(self, over: int) -> None:
        spendable = sum(self.model.take(2**53).values())
        self.reserve(
            f"n{len(self.model.sessions)}", spendable + self.model.held + over, spendable + self.model.held + over
        )

    @rule(sid=SIDS, want=AMOUNTS)
    def reserve_again(self, sid: str, want: int) -> None:
        self.reserve(sid, want, 0)

    def reserve(self, sid: str, want: int, minimum: int) -> None:
        request = self.stand.request(sid, want, minimum, limits=KeyLimits(None, SLOTS))
        assert self.run(self.stand.ledger.reserve(request)) == self.model.reserve(sid, want, minimum)

    @rule(data=st.data())
    @precondition(lambda self: self.model.open())
    def reserve_with_another_body(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(sorted(self.model.open())))
        answer = self.run(self.stand.ledger.reserve(self.stand.request(sid, 1, 0, body_hash="other")))
        assert answer == Refused("conflict", self.model.available, self.model.held)

    @rule(sid=SIDS, q=st.integers(0, 6), metered=st.integers(0, 300), want=AMOUNTS)
    def progress(self, sid: str, q: int, metered: int, want: int) -> None:
        answer = self.run(self.stand.ledger.progress(self.ref(sid), q, metered, want))
        assert answer == self.model.progress(sid, q, metered, want)

    @rule(
        data=st.data(), more=st.integers(0, 300), metered=st.integers(-5, 50), steps=st.sampled_from([1, 1, 1, 0, -1])
    )
    @precondition(lambda self: self.model.open())
    def extend(self, data: st.DataObject, more: int, metered: int, steps: int) -> None:
        sid = data.draw(st.sampled_from(sorted(self.model.open())))
        session = self.model.sessions[sid]
        self.progress(sid, max(0, session.q + steps), max(0, session.metered + metered), session.hold + more)

    @rule(sid=SIDS, charge=AMOUNTS)
    def settle(self, sid: str, charge: int) -> None:
        answer = self.run(self.stand.ledger.settle(self.ref(sid), charge, "completed"))
        assert answer == self.model.settle(sid, charge)

    @rule(data=st.data(), over=st.integers(-50, 200))
    @precondition(lambda self: self.model.open())
    def settle_around_the_hold(self, data: st.DataObject, over: int) -> None:
        sid = data.draw(st.sampled_from(sorted(self.model.open())))
        self.settle(sid, max(0, self.model.sessions[sid].hold + over))

    @rule(sid=SIDS)
    def void(self, sid: str) -> None:
        assert self.run(self.stand.ledger.void(self.ref(sid))) == self.model.void(sid)

    @rule(data=st.data())
    @precondition(lambda self: self.model.open())
    def use_a_foreign_fence(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(sorted(self.model.open())))
        ref = SessionRef(sid, self.stand.account, "key", self.model.sessions[sid].fence + 1)
        assert self.run(self.stand.ledger.settle(ref, 1, "completed")) == Gone("fenced")
        assert self.run(self.stand.ledger.progress(ref, 9, 999, 999)) == Gone("fenced")

    @rule()
    def sweep(self) -> None:
        due = sorted((s.lease, f"acc|{sid}", sid) for sid, s in self.model.open().items() if s.lease <= self.model.now)
        swept = self.run(self.stand.ledger.sweep_due(SHARD, 50))
        ended = {sid: self.model.end(self.model.sessions[sid], self.model.sessions[sid].metered, "swept")
                 for _, _, sid in due}  # fmt: skip
        assert [(one.session, one.charged, one.absorbed, one.entry) for one in swept] == [
            (sid, end.charged, end.absorbed, end.entry) for sid, end in ended.items()
        ]

    @rule(ms=st.sampled_from([1, 50, 1_000, LEASE_MS]))
    def tick(self, ms: int) -> None:
        self.model.now += ms
        self.run(self.stand.wall(self.model.now))

    @rule(data=st.data(), offset=st.sampled_from([-1, 0, 1]))
    def tick_to_a_boundary(self, data: st.DataObject, offset: int) -> None:
        times = [g.expires for g in self.model.grants.values()] + [s.lease for s in self.model.open().values()]
        ahead = sorted(time + offset for time in times if time + offset > self.model.now)
        if ahead:
            self.model.now = data.draw(st.sampled_from(ahead))
            self.run(self.stand.wall(self.model.now))

    @invariant()
    def the_ledger_is_the_model_and_adds_up(self) -> None:
        model, seen = self.model, self.run(self.stand.ledger.snapshot(self.stand.account))
        grants, balance = seen.grants, seen.balance
        for gid, grant in model.grants.items():
            state = grants[gid]
            parts = (state.available, state.held, state.consumed, state.expired, state.voided)
            assert parts == (grant.a, grant.h, grant.c, grant.x, grant.v)
            assert (state.issued, state.revoked) == (sum(parts), grant.revoked)  # I1
            assert min(parts) >= 0
        assert balance.available == sum(state.available for state in grants.values())  # I2
        holds = {sid: session.held for sid, session in seen.sessions.items()}
        assert balance.held == sum(state.held for state in grants.values()) == sum(holds.values())  # I3
        assert all(session.held == sum(session.slices.values()) for session in seen.sessions.values())
        assert balance.sessions == len(holds) == len(model.open())  # I4
        consumed = sum(state.consumed for state in grants.values())
        issued = sum(state.issued - state.expired - state.voided for state in grants.values())
        assert balance.available == issued - consumed - balance.held  # I5
        assert consumed == balance.charged - balance.debt == model.charged
        assert grants.keys() == model.grants.keys()
        assert list(seen.burn_order) == model.burn_order()
        self.check_sessions()
        self.check_journal()

    def check_sessions(self) -> None:
        client, at, model = self.stand.client, self.stand.at, self.model
        leases = self.run(_replies(client.call("ZRANGE", at.leases, "0", "-1", "WITHSCORES")))
        found = {leases[i].decode(): int(leases[i + 1]) for i in range(0, len(leases), 2)}
        assert found == {f"acc|{sid}": session.lease for sid, session in model.open().items()}
        for sid, session in model.sessions.items():
            state, lasts = self.run(_state(client, at.session + sid))
            assert state == session.state.encode()
            assert (lasts == -1) == (session.state == "H")  # I7
        slots = self.run(_replies(client.call("HGET", at.limits + "key", "p")))
        assert int(slots or 0) == len(model.open())

    def check_journal(self) -> None:
        entries = self.run(self.stand.entries())
        assert [name for name, _ in entries] == [f"1-{n}" for n in range(1, self.model.n + 1)]  # I8
        settled = [fields for _, fields in entries if fields["t"] == "settle"]
        assert len({fields["s"] for fields in settled}) == len(settled)
        for fields in settled:
            spent = sum(slices(fields["sl"]).values())
            session = self.model.sessions[fields["s"]]
            assert int(fields["c"]) == spent + int(fields["d"]) == session.charged  # I9
            assert int(fields["ab"]) == session.absorbed
        lost: dict[str, list[int]] = {gid: [0, 0] for gid in self.model.grants}  # expired, voided
        for _, fields in entries:
            if fields["t"] in ("expire", "revoke") and fields["g"] in lost:
                lost[fields["g"]][fields["t"] == "revoke"] += int(fields["a"])
            for name, place in (("br", 0), ("vd", 1), ("sl", 1)):
                if name in fields and (name != "sl" or fields["t"] == "adjust"):
                    for gid, amount in slices(fields[name]).items():
                        lost[gid][place] += amount
        assert lost == {gid: [grant.x, grant.v] for gid, grant in self.model.grants.items()}


def slices(listed: str) -> dict[str, int]:
    """`gid=amount,gid=amount` as a mapping."""
    parts = (part.partition("=") for part in listed.split(",") if part)
    return {gid: int(amount) for gid, _, amount in parts}


async def _replies(call: Any) -> Any:
    return await call


async def _state(client: Any, key: str) -> tuple[bytes, int]:
    return await client.call("HGET", key, "st"), await client.call("PTTL", key)


def test_random_histories_agree_with_the_model() -> None:
    with valkey() as server, asyncio.Runner() as runner:
        LedgerMachine.rig = Rig(runner, server)
        case = LedgerMachine.TestCase
        case.settings = settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        case().runTest()
