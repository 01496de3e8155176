"""How sessions go on and end, and how credit comes in: progress, settle, void, sweep, grant, with an injected clock."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest

from metering.ledger import Balance, Gone, GrantRefused, GrantRequest, Progressed, SessionRef, Settled
from tests.support.valkey import SHARD, WALL, Stand

DAY_MS = 86_400_000
BIG = 2**53 - 1


# --- progress


async def test_progress_renews_the_lease_and_extends_the_hold_as_far_as_credit_goes(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    await stand.tick(5_000)
    assert await stand.ledger.progress(ref, 1, 4, 70) == Progressed(70, 30)
    assert await stand.client.call("ZSCORE", stand.at.leases, "acc|s1") == str(WALL + 20_000).encode()
    assert await stand.ledger.progress(ref, 2, 60, 170) == Progressed(100, 0)
    assert await stand.ledger.progress(ref, 3, 60, 50) == Progressed(100, 0)  # never shrinks
    assert (await stand.hash(stand.at.session + "s1"))["sl"] == "g=100"


async def test_a_repeated_progress_counts_once_and_still_renews_the_lease(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    await stand.ledger.progress(ref, 1, 4, 20)
    await stand.tick(1_000)
    assert await stand.ledger.progress(ref, 1, 4, 20) == Progressed(20, 80)
    assert await stand.client.call("ZSCORE", stand.at.leases, "acc|s1") == str(WALL + 16_000).encode()


@pytest.mark.parametrize(("seq", "metered"), [(1, 9), (2, 9), (2, 3), (3, 7), (1, 8)])
async def test_an_older_or_falling_progress_changes_nothing(stand: Stand, seq: int, metered: int) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    await stand.ledger.progress(ref, 2, 8, 20)
    await stand.tick(1_000)
    before = await stand.state()
    assert await stand.ledger.progress(ref, seq, metered, 90) == Progressed(20, 80, applied=False)
    assert await stand.state() == before


async def test_progress_of_a_session_that_is_not_the_callers(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    before = await stand.state()
    assert await stand.ledger.progress(msgspec.structs.replace(ref, fence=1), 1, 1, 90) == Gone("fenced")
    assert await stand.ledger.progress(msgspec.structs.replace(ref, session="s2"), 1, 1, 90) == Gone("unknown")
    assert await stand.state() == before
    await stand.ledger.settle(ref, 7, "completed")
    assert await stand.ledger.progress(ref, 1, 1, 90) == Gone("final", 7)


async def test_a_blocked_account_keeps_its_hold_and_gets_no_more(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    await stand.client.call("HSET", stand.at.account + "acc", "blk", 1)
    assert await stand.ledger.progress(ref, 1, 1, 90) == Progressed(10, 90)


async def test_an_extension_reaches_into_the_next_grant(stand: Stand) -> None:
    await stand.grant("one", 15)
    await stand.grant("two", 100)
    ref = await stand.hold("s1", 10)
    await stand.ledger.progress(ref, 1, 1, 40)
    assert (await stand.hash(stand.at.session + "s1"))["sl"] == "one=15,two=25"
    await stand.ledger.settle(ref, 20, "completed")
    assert (await stand.entries())[-1][1]["sl"] == "one=15,two=5"


# --- settle


async def test_settling_charges_returns_the_rest_and_journals_once(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60, prompt_cost=3)
    await stand.ledger.progress(ref, 1, 20, 0)
    await stand.tick(500)
    assert await stand.ledger.settle(ref, 45, "completed", b'{"at":"end"}') == Settled(45, 0, 55, 2)
    assert (await stand.entries())[1:] == [
        ("1-2", {
            "t": "settle", "u": "acc", "ts": str(WALL + 500), "s": "s1", "k": "key", "o": "completed", "c": "45",
            "ab": "0", "d": "0", "sl": "g=45", "br": "", "st": str(WALL), "pc": "3", "m": "20", "pv": "price",
            "mt": '{"at":"end"}',
        })
    ]  # fmt: skip
    assert await stand.ledger.balance(stand.account) == Balance(55, 0, 0, 45, 0)
    assert await stand.client.call("ZCARD", stand.at.leases) == 0
    assert 0 < await stand.client.call("PTTL", stand.at.session + "s1") <= DAY_MS
    assert b"mt" not in await stand.client.call("HKEYS", stand.at.session + "s1")


async def test_a_repeated_settle_answers_the_first_charge_and_changes_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.settle(ref, 45, "completed")
    before = await stand.state()
    assert await stand.ledger.settle(ref, 60, "error") == Settled(45, 0, 55, 2, repeated=True)
    assert await stand.state() == before


async def test_settling_without_metadata_keeps_that_of_the_reserve(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.ledger.settle(await stand.hold("s1", 60), 45, "cut")
    assert (await stand.entries())[-1][1]["mt"] == '{"at":"reserve"}'


async def test_another_owners_fence_settles_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    thief = msgspec.structs.replace(ref, fence=ref.fence + 1)
    before = await stand.state()
    assert await stand.ledger.settle(thief, 1, "completed") == Gone("fenced")
    assert await stand.ledger.void(thief) == Gone("fenced")
    assert await stand.state() == before
    await stand.ledger.settle(ref, 1, "completed")
    assert await stand.ledger.settle(thief, 1, "completed") == Gone("fenced")


async def test_settling_an_unknown_or_voided_session(stand: Stand) -> None:
    ref = SessionRef("s1", stand.account, "key", 5)
    assert await stand.ledger.settle(ref, 1, "completed") == Gone("unknown")
    await stand.ledger.void(ref)
    assert await stand.ledger.settle(ref, 1, "completed") == Gone("unknown")


async def test_what_exceeds_the_hold_comes_from_available_grants_and_then_from_the_house(stand: Stand) -> None:
    await stand.grant("one", 30)
    await stand.grant("two", 50)
    ref = await stand.hold("s1", 20)
    assert await stand.ledger.settle(ref, 100, "completed") == Settled(80, 20, 0, 3)
    fields = (await stand.entries())[-1][1]
    assert (fields["c"], fields["ab"], fields["sl"]) == ("80", "20", "one=30,two=50")
    assert await stand.client.call("EXISTS", stand.at.order + "acc") == 0  # both are drained
    assert await stand.ledger.balance(stand.account) == Balance(0, 0, 0, 80, 0)


async def test_excess_skips_expired_grants_and_credit_held_by_others(stand: Stand) -> None:
    await stand.grant("old", 50, priority=1, expires_ms=WALL + 10)
    await stand.grant("g", 100, priority=2)
    await stand.tick(10)
    ref = await stand.hold("s1", 10)
    await stand.hold("s2", 60)
    assert await stand.ledger.settle(ref, 55, "completed") == Settled(40, 15, 50, 3)
    assert (await stand.entries())[-1][1]["sl"] == "g=40"


async def test_the_unused_hold_of_an_expired_grant_breaks(stand: Stand) -> None:
    await stand.grant("old", 50, priority=1, expires_ms=WALL + 10)
    await stand.grant("new", 50, priority=2)
    ref = await stand.hold("s1", 80)
    await stand.tick(10)
    assert await stand.ledger.settle(ref, 20, "completed") == Settled(20, 0, 50, 3)
    fields = (await stand.entries())[-1][1]
    assert (fields["sl"], fields["br"]) == ("old=20", "old=30")
    assert (await stand.ledger.snapshot(stand.account)).grants["old"].expired == 30
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("new",)


async def test_returned_credit_repays_debt_first(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.client.call("HSET", stand.at.account + "acc", "db", 25, "tc", 25)
    assert await stand.ledger.settle(ref, 20, "completed") == Settled(20, 0, 55, 2)
    assert (await stand.entries())[-1][1]["rp"] == "g=25"
    assert await stand.ledger.balance(stand.account) == Balance(55, 0, 0, 45, 0)
    assert (await stand.ledger.snapshot(stand.account)).grants["g"].consumed == 45


async def test_debt_is_repaid_once_across_the_slices_of_a_hold(stand: Stand) -> None:
    await stand.grant("one", 20, priority=1)
    await stand.grant("two", 40, priority=2)
    ref = await stand.hold("s1", 60)
    await stand.client.call("HSET", stand.at.account + "acc", "db", 25, "tc", 25)
    assert await stand.ledger.void(ref) == Settled(0, 0, 35, 3)
    assert (await stand.entries())[-1][1]["rp"] == "one=20,two=5"
    assert await stand.ledger.balance(stand.account) == Balance(35, 0, 0, 25, 0)
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("two",)


async def test_a_drained_grant_leaves_the_burn_order_only_when_nothing_of_it_is_held(stand: Stand) -> None:
    await stand.grant("g", 50)
    first, second = await stand.hold("s1", 20), await stand.hold("s2", 30)
    await stand.ledger.settle(first, 20, "completed")
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("g",)
    await stand.ledger.settle(second, 30, "completed")
    seen = await stand.ledger.snapshot(stand.account)
    assert (seen.burn_order, seen.grants["g"].consumed) == ((), 50)


# --- void and sweep


async def test_voiding_returns_everything_and_journals_it(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    assert await stand.ledger.void(ref) == Settled(0, 0, 100, 2)
    assert await stand.ledger.void(ref) == Settled(0, 0, 100, 2, repeated=True)
    fields = (await stand.entries())[-1][1]
    assert (fields["o"], fields["c"], fields["sl"]) == ("void", "0", "")


async def test_voiding_without_a_fence_is_for_a_reserve_whose_answer_was_lost(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.progress(ref, 1, 5, 60)
    nameless = msgspec.structs.replace(ref, fence=0)
    assert await stand.ledger.void(nameless) == Gone("fenced")
    other = msgspec.structs.replace(await stand.hold("s2", 10), fence=0)
    assert await stand.ledger.void(other) == Settled(0, 0, 40, 2)


async def test_a_repeated_void_without_a_fence_answers_what_the_first_did(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = msgspec.structs.replace(await stand.hold("s1", 60), fence=0)
    assert await stand.ledger.void(ref) == Settled(0, 0, 100, 2)
    before = await stand.state()
    assert await stand.ledger.void(ref) == Settled(0, 0, 100, 2, repeated=True)
    assert await stand.state() == before


async def test_a_void_without_a_fence_is_told_nothing_of_a_session_that_its_owner_settled(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.settle(ref, 9, "completed")
    assert await stand.ledger.void(msgspec.structs.replace(ref, fence=0)) == Gone("fenced")


async def test_voiding_a_settled_session_tells_its_charge(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.settle(ref, 9, "completed")
    assert await stand.ledger.void(ref) == Gone("final", 9)


async def test_a_sweep_waits_for_the_end_of_the_lease_and_charges_the_last_progress(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.progress(ref, 1, 42, 60)
    await stand.tick(15_000 - 1)
    assert await stand.run("sweep") == [b"NOTDUE", b"1"]
    await stand.tick(1)
    assert await stand.run("sweep") == [b"SETTLED", 42, 0, 58, 2]
    fields = (await stand.entries())[-1][1]
    assert (fields["o"], fields["c"], fields["mt"]) == ("swept", "42", '{"at":"reserve"}')
    assert await stand.ledger.settle(ref, 50, "completed") == Gone("final", 42)
    assert await stand.run("sweep") == [b"FINAL", b"42", b"0", 58, b"2", b"swept"]


async def test_a_session_swept_before_any_progress_costs_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60, prompt_cost=30)
    await stand.tick(15_000)
    swept = await stand.ledger.sweep_due(SHARD, 10)
    assert [(one.session, one.charged, one.entry) for one in swept] == [("s1", 0, 2)]
    assert await stand.ledger.balance(stand.account) == Balance(100, 0, 0, 0, 0)


async def test_a_lease_without_its_session_is_dropped_by_the_sweep(stand: Stand) -> None:
    await stand.client.call("ZADD", stand.at.leases, 1, "acc|ghost")
    assert await stand.ledger.sweep_due(SHARD, 10) == []
    assert await stand.client.call("EXISTS", stand.at.leases) == 0


# --- grant


async def test_a_grant_creates_the_account_and_is_journaled(stand: Stand) -> None:
    answer = await stand.grant("g", 100, priority=7, expires_ms=WALL + 5)
    assert (answer.available, answer.entry, answer.repaid, answer.repeated) == (100, 1, 0, False)
    assert await stand.hash(stand.at.account + "acc") == {"av": "100", "hd": "0", "db": "0", "tc": "0", "ns": "0"}
    assert await stand.client.call("ZRANGE", stand.at.order + "acc", 0, -1) == [
        f"07|00{WALL + 5}|0000000000000001|g".encode()
    ]
    assert await stand.client.call("ZSCORE", stand.at.expiries, "acc|g") == str(WALL + 5).encode()
    assert await stand.entries() == [
        ("1-1", {
            "t": "grant", "u": "acc", "ts": str(WALL), "g": "g", "a": "100", "p": "7", "e": str(WALL + 5), "f": "1",
            "rp": "0",
        })
    ]  # fmt: skip


async def test_a_repeated_grant_answers_the_same_and_another_under_its_id_is_a_conflict(stand: Stand) -> None:
    first = await stand.grant("g", 100)
    before = await stand.state()
    assert await stand.grant("g", 100) == dataclasses.replace(first, repeated=True)
    assert await stand.ledger.grant(GrantRequest("g", stand.account, 101)) == GrantRefused("conflict")
    assert await stand.ledger.grant(GrantRequest("g", stand.account, 100, 50, WALL + 1)) == GrantRefused("conflict")
    assert await stand.state() == before


async def test_a_grant_repays_debt_first(stand: Stand) -> None:
    await stand.client.call("HSET", stand.at.account + "acc", "db", 30, "tc", 30)
    assert (await stand.grant("small", 10)).repaid == 10
    answer = await stand.grant("g", 100)
    assert (answer.repaid, answer.available) == (20, 80)
    assert await stand.ledger.balance(stand.account) == Balance(80, 0, 0, 30, 0)
    seen = await stand.ledger.snapshot(stand.account)
    assert (seen.burn_order, seen.grants["small"].consumed, seen.grants["g"].consumed) == (("g",), 10, 20)
    assert (await stand.grant("g", 100)).repaid == 20


async def test_the_65th_open_grant_is_refused_until_one_is_used_up(stand: Stand) -> None:
    for number in range(64):
        await stand.grant(f"g{number:02d}", 1)
    before = await stand.state()
    assert await stand.ledger.grant(GrantRequest("more", stand.account, 1)) == GrantRefused("full")
    assert await stand.state() == before
    await stand.ledger.settle(await stand.hold("s1", 64), 64, "completed")
    await stand.grant("more", 1)


async def test_amounts_stay_exact_up_to_the_largest(stand: Stand) -> None:
    await stand.grant("g", BIG - 1)
    assert await stand.ledger.grant(GrantRequest("more", stand.account, 2)) == GrantRefused("bounds")
    await stand.grant("one", 1)
    ref = await stand.hold("s1", BIG)
    assert (await stand.hash(stand.at.session + "s1"))["sl"] == f"g={BIG - 1},one=1"
    assert await stand.ledger.settle(ref, 10**14, "completed") == Settled(10**14, 0, BIG - 10**14, 3)
    assert (await stand.entries())[-1][1]["c"] == "100000000000000"
    assert await stand.ledger.balance(stand.account) == Balance(BIG - 10**14, 0, 0, 10**14, 0)
