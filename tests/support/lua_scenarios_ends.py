"""Scenarios of what ends a session and of how credit comes in: settle, void, sweep, grant.

Must not: hold anything but scenarios; `lua_scenarios` says what one is.
"""

from __future__ import annotations

import msgspec

from metering.ledger import Gone, GrantRefused, GrantRequest, KeyLimits, Settled
from tests.support.lua_scenarios import (
    DAY_MS,
    LEASE_MS,
    account,
    adds_up,
    grant_of,
    last_entry,
    lease,
    saved_clock,
    scenario,
    session,
    unchanged,
)
from tests.support.valkey import WALL, Stand


@scenario
async def settling_charges_and_returns_the_rest(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60, prompt_cost=3)
    await stand.ledger.progress(ref, 1, 20, 0)
    await stand.tick(500)
    assert await stand.ledger.settle(ref, 45, "completed", b'{"at":"end"}') == Settled(45, 0, 55, 2)
    assert await account(stand) == {"av": 55, "hd": 0, "db": 0, "tc": 45, "ns": 0, "hc": 0}
    assert await grant_of(stand, "g") == {"i": 100, "a": 55, "h": 0, "c": 45, "x": 0, "v": 0}
    assert await saved_clock(stand) == WALL + 500
    fields = await last_entry(stand)
    assert {name: fields[name] for name in ("t", "s", "o", "c", "ab", "sl", "br", "st", "pc", "m", "mt", "ts")} == {
        "t": "settle", "s": "s1", "o": "completed", "c": "45", "ab": "0", "sl": "g=45", "br": "", "st": str(WALL),
        "pc": "3", "m": "20", "mt": '{"at":"end"}', "ts": str(WALL + 500),
    }  # fmt: skip
    await adds_up(stand)


@scenario
async def an_ended_session_leaves_a_small_record_for_a_day(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.settle(ref, 45, "cut")
    assert 0 < await stand.client.call("PTTL", stand.at.session + "s1") <= DAY_MS
    assert await session(stand, "s1", "st", "o", "c", "n", "mt", "sl") == ["T", "cut", "45", "2", None, None]
    assert await lease(stand, "s1") is None
    assert await stand.hash(stand.at.limits + "key") == {"p": "0"}
    assert (await last_entry(stand))["mt"] == '{"at":"reserve"}'


@scenario
async def a_repeated_settle_charges_once(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 30)
    await stand.hold("s2", 30)
    await stand.ledger.settle(ref, 20, "completed")
    await unchanged(stand, "settle", [b"FINAL", b"20", b"0", 50, b"2", b"completed"], charge="30")


@scenario
async def another_fence_ends_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60)
    for script in ("settle", "void"):
        await unchanged(stand, script, [b"FENCED"], fence=str(WALL + 1))


@scenario
async def another_account_or_key_ends_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60)
    await stand.tick(LEASE_MS)
    for script in ("settle", "void", "sweep"):
        await unchanged(stand, script, [b"BOUNDS", b"session"], kid="other")


@scenario
async def only_a_void_may_say_void_and_charges_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60)
    await unchanged(stand, "settle", [b"BOUNDS", b"outcome"], outcome="void", charge="1")
    await unchanged(stand, "settle", [b"BOUNDS", b"outcome"], outcome="swept")
    assert (await stand.run("settle", outcome="void", charge="0"))[:2] == [b"SETTLED", 0]


@scenario
async def slices_pay_in_the_order_in_which_they_were_taken(stand: Stand) -> None:
    await stand.grant("one", 20, priority=1)
    await stand.grant("two", 50, priority=2)
    ref = await stand.hold("s1", 60)
    assert await stand.ledger.settle(ref, 30, "completed") == Settled(30, 0, 40, 3)
    assert (await last_entry(stand))["sl"] == "one=20,two=10"
    assert (await grant_of(stand, "two"))["a"] == 40
    await adds_up(stand)


@scenario
async def excess_comes_from_available_grants_and_then_from_the_house(stand: Stand) -> None:
    await stand.grant("old", 50, priority=1, expires_ms=WALL + 10)
    await stand.tick(10)
    await stand.grant("one", 30, priority=2)
    await stand.grant("two", 50, priority=3)
    first, second = await stand.hold("s1", 20), await stand.hold("s2", 5)
    assert await stand.ledger.settle(first, 100, "completed") == Settled(75, 25, 50, 4)
    assert (await account(stand))["tc"] == 75
    fields = await last_entry(stand)
    assert (fields["c"], fields["ab"], fields["sl"]) == ("75", "25", "one=25,two=50")
    await adds_up(stand)
    await stand.ledger.settle(second, 5, "completed")
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("old",)
    await adds_up(stand)


@scenario
async def the_unused_hold_of_an_expired_grant_breaks(stand: Stand) -> None:
    await stand.grant("old", 60, priority=1, expires_ms=WALL + 10)
    await stand.grant("new", 50, priority=2)
    first, second = await stand.hold("s1", 20), await stand.hold("s2", 70)
    await stand.tick(10)
    assert await stand.ledger.settle(first, 15, "completed") == Settled(15, 0, 20, 3)
    assert (await last_entry(stand))["br"] == "old=5"
    assert await stand.ledger.settle(second, 10, "completed") == Settled(10, 0, 50, 4)
    assert await grant_of(stand, "old") == {"i": 60, "a": 0, "h": 0, "c": 25, "x": 35, "v": 0}
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("new",)
    await adds_up(stand)


@scenario
async def a_hold_that_ends_before_its_grant_returns_to_it(stand: Stand) -> None:
    await stand.grant("g", 60, expires_ms=WALL + 10)
    ref = await stand.hold("s1", 20)
    await stand.tick(9)
    assert await stand.ledger.settle(ref, 15, "completed") == Settled(15, 0, 45, 2)
    assert await grant_of(stand, "g") == {"i": 60, "a": 45, "h": 0, "c": 15, "x": 0, "v": 0}


@scenario
async def debt_is_repaid_once_by_what_comes_back(stand: Stand) -> None:
    await stand.grant("one", 20, priority=1)
    await stand.grant("two", 40, priority=2)
    ref = await stand.hold("s1", 60)
    await stand.client.call("HSET", stand.at.account + "acc", "db", 25, "tc", 25)
    assert await stand.ledger.void(ref) == Settled(0, 0, 35, 3)
    assert (await last_entry(stand))["rp"] == "one=20,two=5"
    figures = await account(stand)
    assert (figures["db"], figures["tc"], figures["av"]) == (0, 25, 35)
    await adds_up(stand)


@scenario
async def a_drained_grant_leaves_the_burn_order_with_its_last_hold(stand: Stand) -> None:
    await stand.grant("g", 50)
    first, second = await stand.hold("s1", 20), await stand.hold("s2", 30)
    await stand.ledger.settle(first, 20, "completed")
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("g",)
    await stand.ledger.settle(second, 30, "completed")
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ()


@scenario
async def a_server_out_of_memory_still_settles_and_voids(stand: Stand) -> None:
    await stand.grant("g", 100)
    refs = [await stand.hold(f"s{number}", 20) for number in (1, 2, 3)]
    await stand.tick(LEASE_MS)
    await stand.client.call("CONFIG", "SET", "maxmemory", "1")
    try:
        assert await stand.ledger.settle(refs[0], 5, "completed") == Settled(5, 0, 55, 2)
        assert await stand.ledger.void(refs[1]) == Settled(0, 0, 75, 3)
        assert (await stand.run("sweep", sid="s3"))[0] == b"SETTLED"
    finally:
        await stand.client.call("CONFIG", "SET", "maxmemory", "0")


# --- void and sweep


@scenario
async def voiding_returns_everything_once(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60, limits=KeyLimits(parallel_sessions=1))
    await stand.ledger.progress(ref, 1, 42, 0)
    assert await stand.ledger.void(ref) == Settled(0, 0, 100, 2)
    fields = await last_entry(stand)
    assert (fields["o"], fields["c"], fields["sl"]) == ("void", "0", "")
    before = await stand.state()
    assert await stand.ledger.void(ref) == Settled(0, 0, 100, 2, repeated=True)
    assert await stand.state() == before
    await stand.hold("s2", 1, limits=KeyLimits(parallel_sessions=1))
    await adds_up(stand)


@scenario
async def voiding_without_a_fence_is_for_sessions_that_never_went_on(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.progress(ref, 1, 5, 60)
    await unchanged(stand, "void", [b"FENCED"], fence="0")
    other = msgspec.structs.replace(await stand.hold("s2", 10), fence=0)
    assert await stand.ledger.void(other) == Settled(0, 0, 40, 2)
    assert await stand.ledger.void(other) == Settled(0, 0, 40, 2, repeated=True)
    await stand.ledger.settle(ref, 7, "completed")
    await unchanged(stand, "void", [b"FENCED"], fence="0")


@scenario
async def a_sweep_waits_for_the_lease_and_charges_the_last_progress(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.progress(ref, 1, 42, 60)
    await stand.tick(LEASE_MS - 1)
    await unchanged(stand, "sweep", [b"NOTDUE", b"1"])
    await stand.tick(1)
    assert await stand.run("sweep") == [b"SETTLED", 42, 0, 58, 2]
    fields = await last_entry(stand)
    assert (fields["o"], fields["c"], fields["mt"]) == ("swept", "42", '{"at":"reserve"}')
    assert await stand.ledger.settle(ref, 50, "completed") == Gone("final", 42)
    await unchanged(stand, "sweep", [b"FINAL", b"42", b"0", 58, b"2", b"swept"])
    await adds_up(stand)


@scenario
async def a_lease_without_a_session_is_dropped(stand: Stand) -> None:
    await stand.client.call("ZADD", stand.at.leases, 1, "acc|s1")
    assert await stand.run("sweep") == [b"UNKNOWN"]
    assert await lease(stand, "s1") is None


# --- grant


@scenario
async def a_grant_is_issued_once(stand: Stand) -> None:
    assert (await stand.grant("g", 100, expires_ms=WALL + 5)).entry == 1
    before = await stand.state()
    assert (await stand.grant("g", 100, expires_ms=WALL + 5)).repeated
    for wrong in (GrantRequest("g", stand.account, 101, 50, WALL + 5), GrantRequest("g", stand.account, 100, 50, 0)):
        assert await stand.ledger.grant(wrong) == GrantRefused("conflict")
    assert await stand.state() == before
    assert (await grant_of(stand, "g"))["a"] == 100
    assert await stand.client.call("ZSCORE", stand.at.expiries, "acc|g") == str(WALL + 5).encode()
    await adds_up(stand)


@scenario
async def each_grant_is_one_more_entry_at_the_shards_time(stand: Stand) -> None:
    await stand.grant("one", 1)
    await stand.tick(9)
    assert (await stand.grant("two", 1)).entry == 2
    assert await saved_clock(stand) == WALL + 9
    await adds_up(stand)


@scenario
async def a_grant_repays_debt_first(stand: Stand) -> None:
    await stand.client.call("HSET", stand.at.account + "acc", "db", 30, "tc", 30)
    assert (await stand.grant("small", 10)).repaid == 10
    answer = await stand.grant("g", 100)
    assert (answer.repaid, answer.available) == (20, 80)
    assert (await account(stand))["db"] == 0
    assert (await stand.grant("g", 100)).repaid == 20
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("g",)
    await adds_up(stand)


@scenario
async def the_65th_open_grant_is_refused(stand: Stand) -> None:
    for number in range(64):
        await stand.grant(f"g{number:02d}", 1)
    await unchanged(stand, "grant", [b"FULL"], gid="more")
    await stand.ledger.settle(await stand.hold("s1", 2), 2, "completed")
    await stand.grant("more", 1)


@scenario
async def the_sum_of_an_accounts_credit_stays_countable(stand: Stand) -> None:
    await stand.grant("g", 2**53 - 2)
    await unchanged(stand, "grant", [b"BOUNDS", b"total"], gid="more", credit="2")
    await stand.grant("one", 1)


@scenario
async def an_absurd_charge_is_counted_to_the_micro(stand: Stand) -> None:
    """Sums of two amounts pass 2^53, where doubles begin to round: only what was paid may be added."""
    await stand.grant("g", 1000)
    await stand.ledger.settle(await stand.hold("s0", 10), 400, "completed")
    last = await stand.hold("s1", 10)
    assert await stand.ledger.settle(last, 2**53 - 1, "completed") == Settled(600, 2**53 - 1 - 600, 0, 3)
    await adds_up(stand)
