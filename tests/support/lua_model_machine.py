"""Random histories of the ledger's verbs on a real server, each answer held against the model's, each step checked.

One rule is one verb, or a verb steered to where rules change (the end of credit, a lease, an expiry, the hour of a
correction). Must not: repeat a rule of the ledger (the model does).
"""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from metering.ledger import KeyLimits, Outcome, SessionRef
from tests.support.lua_model import HOUR_MS
from tests.support.lua_model_rules import AMOUNTS, OVERS, SMALL, WHICH, CreditRules, words
from tests.support.valkey import SHARD, Stand

SLOTS = 3
FENCES = st.sampled_from(["own"] * 4 + ["none", "another"])
OUTCOMES: st.SearchStrategy[Outcome] = st.sampled_from(["completed", "aborted", "cut", "error"])
WITHOUT_EPOCH = {"init", "freeze"}


class LedgerMachine(CreditRules):
    """Sessions on top. `rate`: the requests per minute that the key has in this history, where a rule says no other."""

    rate: int | None = None

    @initialize(rate=st.sampled_from([None, None, 3, 5]))
    def begin_with_limits(self, rate: int | None) -> None:
        self.rate = rate

    # --- reserve

    def reserve(self, sid: str, want: int, minimum: int, **changes: Any) -> None:
        limits = KeyLimits(changes.pop("rate", self.rate), SLOTS)
        asked = self.stand.request(sid, want, minimum, limits=limits, **changes)
        self.same("reserve", self.run(self.ledger.reserve(asked)), self.model.reserve(asked))

    @property
    def new_sid(self) -> str:
        return f"n{len(self.model.sessions)}"

    @rule(want=SMALL, which=WHICH)
    def try_while_blocked(self, want: int, which: int) -> None:
        """No verb writes this field yet; those that read it are held to it."""
        self.block(True)
        self.reserve(self.new_sid, want, 0)
        sid = self.sid(which)
        one = self.model.sessions.get(sid)
        if one is not None:
            self.progress(sid, one.q + 1, one.metered + 1, one.hold + want, "own")
        self.block(False)

    def block(self, blocked: bool) -> None:
        self.model.blocked = blocked
        self.run(_block(self.stand, blocked))

    @rule(want=AMOUNTS, part=st.integers(0, 4), rate=st.sampled_from([None, 5, 2, 0]))
    def reserve_anew(self, want: int, part: int, rate: int | None) -> None:
        self.reserve(self.new_sid, want, want * part // 4, rate=rate)

    @rule(want=SMALL)
    def reserve_a_little(self, want: int) -> None:
        self.reserve(self.new_sid, want, 0)

    @rule(over=OVERS, held=st.booleans())
    def reserve_at_a_boundary(self, over: int, held: bool) -> None:
        want = max(0, self.everything + over + (self.model.held if held else 0))
        self.reserve(self.new_sid, want, want)

    @rule(which=WHICH, want=AMOUNTS, body=st.sampled_from(["hash", "hash", "other"]))
    def reserve_again(self, which: int, want: int, body: str) -> None:
        self.reserve(self.sid(which), want, 0, body_hash=body)

    @rule(
        key=st.sampled_from(["1" * 64, "2" * 64]), body=st.sampled_from(["hash", "hash", "other"]), void=st.booleans()
    )
    def reserve_with_a_key(self, key: str, body: str, void: bool) -> None:
        past = self.model.keyed[key][0] if void and key in self.model.keyed else ""
        self.reserve(self.new_sid, 50, 0, body_hash=body, idempotency=key, past=past)

    @rule(data=st.data())
    @precondition(lambda self: self.model.open())
    def reserve_with_another_body(self, data: st.DataObject) -> None:
        self.reserve(self.open_one(data), 1, 0, body_hash="other")

    # --- a session's life

    def open_one(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.model.open())))

    @rule(which=WHICH, q=st.integers(0, 6), metered=st.integers(0, 300), want=AMOUNTS, fence=FENCES)
    def progress_any(self, which: int, q: int, metered: int, want: int, fence: str) -> None:
        self.progress(self.sid(which), q, metered, want, fence)

    def progress(self, sid: str, q: int, metered: int, want: int, fence: str) -> None:
        ref = self.ref(sid, fence)
        answer = self.run(self.ledger.progress(ref, q, metered, want))
        self.same("progress", answer, self.model.progress(ref, q, metered, want))

    @rule(
        data=st.data(),
        more=st.integers(0, 300),
        metered=st.sampled_from([0, 1, 30, 50, -5]),
        steps=st.sampled_from([1, 1, 1, 0, -1]),
    )
    @precondition(lambda self: self.model.open())
    def extend(self, data: st.DataObject, more: int, metered: int, steps: int) -> None:
        sid = self.open_one(data)
        one = self.model.sessions[sid]
        self.progress(sid, max(0, one.q + steps), max(0, one.metered + metered), one.hold + more, "own")

    @rule(data=st.data(), over=OVERS)
    @precondition(lambda self: self.model.open())
    def extend_to_the_end_of_credit(self, data: st.DataObject, over: int) -> None:
        sid = self.open_one(data)
        one = self.model.sessions[sid]
        self.progress(sid, one.q + 1, one.metered + 30, max(0, one.hold + self.everything + over), "own")

    @rule(data=st.data(), late=st.sampled_from([(0, 0), (0, 1), (-1, 0), (1, -1), (1, -20)]))
    @precondition(lambda self: self.model.open())
    def checkpoints_overtake(self, data: st.DataObject, late: tuple[int, int]) -> None:
        """A checkpoint, and one that is a repeat, older, or falls."""
        sid = self.open_one(data)
        one = self.model.sessions[sid]
        q, metered = one.q + 1, one.metered + 20
        self.progress(sid, q, metered, one.hold, "own")
        self.progress(sid, q + late[0], metered + late[1], one.hold + 10, "own")

    @rule(
        known=st.booleans(), which=WHICH, q=st.integers(0, 3), metered=st.integers(0, 60), want=AMOUNTS,
        ago=st.sampled_from([0, 50, 1_000, 20_000]),
    )  # fmt: skip
    def reassert(self, known: bool, which: int, q: int, metered: int, want: int, ago: int) -> None:
        sid = self.sid(which) if known else self.new_sid
        ref = SessionRef(sid, self.stand.account, "key", self.model.now - ago)
        asked = {"fence": ref.fence, "q": q, "metered": metered, "want": want}
        reply = self.run(self.stand.run("reassert", sid=sid, **{name: str(value) for name, value in asked.items()}))
        self.same("reassert", words(reply), self.model.reassert(ref, q, metered, want))

    # --- its end

    @rule(which=WHICH, charge=AMOUNTS, outcome=OUTCOMES, fence=FENCES)
    def settle_any(self, which: int, charge: int, outcome: Outcome, fence: str) -> None:
        self.settle(self.sid(which), charge, outcome, fence)

    def settle(self, sid: str, charge: int, outcome: Outcome, fence: str) -> None:
        ref = self.ref(sid, fence)
        answer = self.run(self.ledger.settle(ref, charge, outcome))
        self.same("settle", answer, self.model.settle(ref, charge, outcome))

    @rule(data=st.data(), over=st.integers(-50, 200))
    @precondition(lambda self: self.model.open())
    def settle_around_the_hold(self, data: st.DataObject, over: int) -> None:
        sid = self.open_one(data)
        self.settle(sid, max(0, self.model.sessions[sid].hold + over), "completed", "own")

    @rule(data=st.data(), over=OVERS)
    @precondition(lambda self: self.model.open())
    def settle_at_the_end_of_credit(self, data: st.DataObject, over: int) -> None:
        sid = self.open_one(data)
        self.settle(sid, max(0, self.model.sessions[sid].hold + self.everything + over), "cut", "own")

    @rule(over=st.sampled_from([1, 50]), charge=SMALL, limit=st.sampled_from([30, 400]))
    @precondition(lambda self: len(self.model.open()) < SLOTS - 1 and self.model.spendable > 1)
    def owe_while_another_holds(self, over: int, charge: int, limit: int) -> None:
        """One session uses up the grants and some of the line; what another gives back then repays."""
        first, second = self.new_sid, f"n{len(self.model.sessions) + 1}"
        self.change_policy("postpaid", self.model.debt + self.model.line + limit, self.model.revision + 1)
        self.reserve(first, 10, 0, rate=None)
        self.reserve(second, max(0, self.model.spendable - 5), 0, rate=None)
        if second in self.model.open():
            self.settle(first, self.model.sessions[first].hold + self.model.spendable + over, "completed", "own")
            self.settle(second, charge, "completed", "own")

    @rule(which=WHICH, fence=FENCES)
    def void_any(self, which: int, fence: str) -> None:
        self.void(self.sid(which), fence)

    def void(self, sid: str, fence: str) -> None:
        ref = self.ref(sid, fence)
        self.same("void", self.run(self.ledger.void(ref)), self.model.void(ref))

    @rule(want=SMALL)
    def give_a_reserve_up(self, want: int) -> None:
        """Its answer did not come in time; the reserve itself comes after the void."""
        sid = self.new_sid
        self.void(sid, "none")
        self.reserve(sid, want, 0)

    @rule(data=st.data(), fence=FENCES)
    @precondition(lambda self: self.model.open())
    def void_what_is_open(self, data: st.DataObject, fence: str) -> None:
        self.void(self.open_one(data), fence)

    @rule(which=WHICH)
    def sweep(self, which: int) -> None:
        sid = self.sid(which)
        self.same("sweep", words(self.run(self.stand.run("sweep", sid=sid))), self.model.sweep(sid))

    @rule()
    def sweep_due(self) -> None:
        swept = self.run(self.ledger.sweep_due(SHARD, 50))
        expected = self.model.sweep_due()
        self.rig.reached["sweep: due"] += len(expected)
        assert [(one.session, one.charged, one.absorbed, one.entry) for one in swept] == expected
        self.check()

    @rule(offset=OVERS, back=st.sampled_from([None, 0, HOUR_MS, HOUR_MS + 1]), more=st.integers(0, 3) | SMALL)
    @precondition(lambda self: self.model.open())
    def lose_a_gateway(self, offset: int, back: int | None, more: int) -> None:
        """To the end of the first lease, and the sweeper; perhaps the owner comes back some ms after that."""
        self.wall(max(self.model.now, min(one.lease for one in self.model.open().values()) + offset))
        self.sweep_due()
        swept = self.model.swept()
        if back is not None and swept:
            sid, one = max(swept.items(), key=lambda pair: pair[1].entry)
            self.wall(max(self.model.wall, one.ended + back))
            due = one.charged + one.absorbed + more
            self.correct(sid, due, "own")
            self.correct(sid, due, "own")

    @rule(which=WHICH, charge=AMOUNTS, fence=FENCES)
    def correct_any(self, which: int, charge: int, fence: str) -> None:
        self.correct(self.sid(which), charge, fence)

    def correct(self, sid: str, charge: int, fence: str) -> None:
        ref = self.ref(sid, fence)
        self.same("correct", self.run(self.ledger.correct(ref, charge, b"")), self.model.correct(ref, charge))

    @rule(data=st.data(), more=st.sampled_from([0, 1, 1, 60, 300]), rest=st.booleans())
    @precondition(lambda self: self.model.swept())
    def correct_what_was_swept(self, data: st.DataObject, more: int, rest: bool) -> None:
        sid = data.draw(st.sampled_from(sorted(self.model.swept())))
        one = self.model.sessions[sid]
        self.correct(sid, one.charged + one.absorbed + more + (self.everything if rest else 0), "own")

    @rule(
        data=st.data(), offset=OVERS, noticed=st.sampled_from(["never", "before", "after"]), charge=st.integers(0, 20)
    )
    @precondition(lambda self: self.ending())
    def end_a_grant(self, data: st.DataObject, offset: int, noticed: str, charge: int) -> None:
        """To the end of a grant that is held, and a session's end, before or after the expirer comes."""
        gid = data.draw(st.sampled_from(self.ending()))
        if not self.model.grants[gid].h:
            self.reserve(self.new_sid, self.model.spendable, 0, rate=None)
        self.wall(self.model.grants[gid].expires + offset)
        if noticed == "before":
            self.expire_due()
        holding = [sid for sid, one in self.model.open().items() if gid in one.slices]
        if holding:
            self.settle(holding[0], charge, "aborted", "own")
        if noticed == "after":
            self.expire_due()

    def ending(self) -> list[str]:
        """Grants with credit that will end, the first first."""
        grants, now = self.model.grants, self.model.now
        ending = [(one.expires, gid) for gid, one in grants.items() if one.expires > now + 1 and (one.a or one.h)]
        return [gid for _, gid in sorted(ending)]

    # --- not ours

    @rule(which=WHICH, frozen=st.booleans())
    def another_epoch_changes_nothing(self, which: int, frozen: bool) -> None:
        """Callers of before a rebuild, and everybody while the shard is frozen."""
        self.run(_shut_out(self.stand, self.sid(which), frozen, self.model.n))


async def _block(stand: Stand, blocked: bool) -> None:
    await stand.client.call("HSET", stand.at.account + stand.account.id, "blk", int(blocked))


async def _shut_out(stand: Stand, sid: str, frozen: bool, n: int) -> None:
    meta = stand.at.meta
    before = await stand.state()
    if frozen:
        assert words(await stand.run("freeze", ep="1")) == ["FROZEN", "1", str(n)]
        assert words(await stand.run("freeze", ep="")) == ["FROZEN", "1", str(n)]
    assert words(await stand.run("freeze", ep="2")) == ["EPOCH"]
    assert words(await stand.run("init", ep="2")) == ["EXISTS", "-1" if frozen else "1"]
    for name in stand.scripts.keys() - WITHOUT_EPOCH:
        assert words(await stand.run(name, sid=sid, ep="1" if frozen else "2")) == ["EPOCH"], name
    if frozen:
        await asyncio.gather(stand.client.call("HSET", meta, "ep", "1"), stand.client.call("HDEL", meta, "was"))
    assert await stand.state() == before
