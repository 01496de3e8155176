"""How sessions begin: init, due, audit and reserve with its limits, on a real server with an injected clock."""

from __future__ import annotations

import pytest

from metering.ledger import (
    AccountRef,
    Balance,
    Gone,
    GrantRequest,
    Held,
    KeyLimits,
    Refused,
    SessionRef,
    Settled,
)
from tests.support.valkey import SHARD, WALL, Stand

DAY_MS = 86_400_000


# --- init, due, audit


async def test_init_creates_a_shard_once_and_never_changes_it(stand: Stand) -> None:
    await stand.grant("g", 5)
    before = await stand.state()
    assert await stand.run("init", ep="7") == [b"EXISTS", b"1"]
    assert await stand.state() == before


async def test_due_lists_leases_from_the_millisecond_they_end(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 10)
    await stand.tick(5)
    await stand.hold("s2", 10)
    await stand.wall(WALL + 15_000 - 1)
    assert await stand.run("due") == [b"DUE"]
    await stand.tick(1)
    assert await stand.run("due") == [b"DUE", b"acc|s1"]
    await stand.tick(5)
    assert await stand.run("due") == [b"DUE", b"acc|s1", b"acc|s2"]
    assert await stand.run("due", limit="1") == [b"DUE", b"acc|s1"]


async def test_the_audit_shows_one_instant_of_an_account(stand: Stand) -> None:
    await stand.grant("late", 100, priority=60)
    await stand.grant("early", 30, priority=10, expires_ms=WALL + 1_000)
    await stand.grant("other", 9, uid="other")
    await stand.hold("s1", 50)
    seen = await stand.ledger.snapshot(stand.account)
    assert seen.balance == Balance(available=80, held=50, debt=0, charged=0, sessions=1)
    assert seen.burn_order == ("early", "late")
    assert seen.sessions["s1"].slices == {"early": 30, "late": 20}
    assert seen.sessions["s1"].lease_until_ms == WALL + 15_000
    assert (seen.epoch, seen.entry, seen.now_ms) == (1, 3, WALL)
    early = seen.grants["early"]
    assert (early.issued, early.available, early.held, early.expires_ms) == (30, 0, 30, WALL + 1_000)


async def test_a_lease_that_ends_at_a_round_number_stays_a_whole_number(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.wall(1_800_000_000_000 - 15_000)
    await stand.hold("s1", 10)
    assert (await stand.ledger.snapshot(stand.account)).sessions["s1"].lease_until_ms == 1_800_000_000_000
    await stand.tick(1_000)
    again = await stand.ledger.reserve(stand.request("s1", 10))
    assert isinstance(again, Held)
    assert again.lease_ms == 14_000
    await stand.tick(14_000)
    assert [one.session for one in await stand.ledger.sweep_due(SHARD, 5)] == ["s1"]


# --- reserve


async def test_a_hold_takes_up_to_want_and_accepts_down_to_minimum(stand: Stand) -> None:
    await stand.grant("g", 100)
    assert await stand.ledger.reserve(stand.request("s1", 60)) == Held(60, 40, WALL, 15_000)
    assert await stand.ledger.reserve(stand.request("s2", 60, 40)) == Held(40, 0, WALL, 15_000)


async def test_a_session_is_stored_with_all_that_a_sweep_needs_and_no_deadline(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60, prompt_cost=7)
    key = stand.at.session + "s1"
    assert await stand.hash(key) == {
        "st": "H", "f": str(WALL), "u": "acc", "k": "key", "h": "60", "m": "0", "q": "0", "pc": "7", "ow": "owner",
        "bh": "hash", "pv": "price", "mt": '{"at":"reserve"}', "ts": str(WALL), "sl": "g=60",
    }  # fmt: skip
    assert await stand.client.call("PTTL", key) == -1
    assert await stand.client.call("ZSCORE", stand.at.leases, "acc|s1") == str(WALL + 15_000).encode()


async def test_a_repeated_reserve_answers_the_same_and_holds_once(stand: Stand) -> None:
    await stand.grant("g", 100)
    request = stand.request("s1", 60, limits=KeyLimits(1, 1))
    await stand.ledger.reserve(request)
    await stand.tick(1_000)
    before = await stand.state()
    assert await stand.ledger.reserve(request) == Held(60, 40, WALL, 14_000, repeated=True)
    assert await stand.state() == before


@pytest.mark.parametrize("field", ["body_hash", "owner", "key"])
async def test_the_same_session_with_anything_else_is_a_conflict(stand: Stand, field: str) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60)
    assert await stand.ledger.reserve(stand.request("s1", 60, None, **{field: "else"})) == Refused("conflict", 40, 60)


async def test_a_reserve_after_the_end_of_its_session_is_refused(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    await stand.ledger.settle(ref, 10, "completed")
    assert await stand.ledger.reserve(stand.request("s1", 60)) == Refused("finished", 90, 0)


async def test_a_reserve_that_comes_after_its_void_is_refused(stand: Stand) -> None:
    await stand.grant("g", 100)
    assert await stand.ledger.void(SessionRef("s1", stand.account, "key", 0)) == Gone("unknown")
    assert await stand.ledger.reserve(stand.request("s1", 60)) == Refused("tombstone", 100, 0)
    assert 0 < await stand.client.call("PTTL", stand.at.session + "s1") <= DAY_MS
    assert len(await stand.entries()) == 1  # the grant's; a tombstone has none


async def test_too_little_credit_is_balance_and_held_credit_that_would_do_is_in_flight(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60)
    before = await stand.state()
    assert await stand.ledger.reserve(stand.request("s2", 101)) == Refused("balance", 40, 60)
    assert await stand.ledger.reserve(stand.request("s2", 100)) == Refused("in_flight", 40, 60, 1_000)
    assert await stand.ledger.reserve(stand.request("s2", 41)) == Refused("in_flight", 40, 60, 1_000)
    assert await stand.state() == before


async def test_an_account_without_grants_has_nothing(stand: Stand) -> None:
    request = stand.request("s1", 1, account=AccountRef("nobody", SHARD))
    before = await stand.state()
    assert await stand.ledger.reserve(request) == Refused("balance", 0, 0)
    assert await stand.state() == before


async def test_a_free_call_needs_no_credit(stand: Stand) -> None:
    ref = await stand.hold("s1", 0, account=AccountRef("nobody", SHARD))
    assert await stand.ledger.settle(ref, 0, "completed") == Settled(0, 0, 0, 1)


async def test_a_refusal_may_pass_later_with_the_same_session(stand: Stand) -> None:
    assert await stand.ledger.reserve(stand.request("s1", 5)) == Refused("balance", 0, 0)
    await stand.grant("g", 5)
    assert isinstance(await stand.ledger.reserve(stand.request("s1", 5)), Held)


async def test_blocked_and_indebted_accounts_get_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.client.call("HSET", stand.at.account + "acc", "db", 3)
    assert await stand.ledger.reserve(stand.request("s1", 5)) == Refused("debt", 100, 0)
    await stand.client.call("HSET", stand.at.account + "acc", "blk", 1)
    assert await stand.ledger.reserve(stand.request("s1", 5)) == Refused("blocked", 100, 0)


async def test_grants_burn_by_priority_then_expiry_then_age_then_id(stand: Stand) -> None:
    for gid, priority, expires, created in [
        ("d", 50, 0, 1), ("c", 50, WALL + 9_000, 2), ("b2", 50, WALL + 9_000, 1), ("b1", 50, WALL + 9_000, 1),
        ("a", 9, 0, 9), ("e", 99, WALL + 1, 0),
    ]:  # fmt: skip
        await stand.ledger.grant(GrantRequest(gid, stand.account, 10, priority, expires, created))
    await stand.hold("s1", 60)
    assert (await stand.hash(stand.at.session + "s1"))["sl"] == "a=10,b1=10,b2=10,c=10,d=10,e=10"


async def test_a_grant_that_others_hold_whole_is_passed_over(stand: Stand) -> None:
    for priority, gid in enumerate(("one", "two", "three")):
        await stand.grant(gid, 10, priority)
    await stand.hold("s1", 10)
    await stand.hold("s2", 15)
    assert (await stand.hash(stand.at.session + "s2"))["sl"] == "two=10,three=5"


@pytest.mark.parametrize(("offset", "spendable"), [(-1, True), (0, False), (1, False)])
async def test_a_grant_is_spendable_until_the_millisecond_it_expires(
    stand: Stand, offset: int, spendable: bool
) -> None:
    await stand.grant("g", 100, expires_ms=WALL + 1_000)
    await stand.wall(WALL + 1_000 + offset)
    answer = await stand.ledger.reserve(stand.request("s1", 100))
    assert answer == (Held(100, 0, stand.now, 15_000) if spendable else Refused("balance", 0, 0))


async def test_a_clock_that_goes_back_revives_no_expired_grant(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=WALL + 1_000)
    await stand.grant("h", 5)
    await stand.wall(WALL + 2_000)
    await stand.hold("s1", 1)
    await stand.wall(WALL - 30_000)
    assert await stand.ledger.reserve(stand.request("s2", 100)) == Refused("balance", 4, 1)


# --- the key's limits


async def test_parallel_sessions_are_counted_until_they_end(stand: Stand) -> None:
    await stand.grant("g", 100)
    limits = KeyLimits(parallel_sessions=2)
    first = await stand.hold("s1", 1, limits=limits)
    second = await stand.hold("s2", 1, limits=limits)
    assert await stand.ledger.reserve(stand.request("s3", 1, limits=limits)) == Refused("parallel", 98, 2, 1_000)
    await stand.hold("s3", 1, limits=limits, key="another")
    await stand.ledger.settle(first, 1, "completed")
    await stand.hold("s4", 1, limits=limits)
    await stand.ledger.void(second)
    await stand.ledger.settle(first, 1, "completed")  # a repeat frees no second slot
    await stand.hold("s5", 1, limits=limits)
    assert await stand.ledger.reserve(stand.request("s6", 1, limits=limits)) == Refused("parallel", 96, 3, 1_000)


async def test_requests_per_minute_slide_and_the_wait_is_exact(stand: Stand) -> None:
    await stand.grant("g", 100)
    limits = KeyLimits(requests_per_minute=2)
    await stand.hold("s1", 1, limits=limits)
    await stand.tick(20_000)
    await stand.hold("s2", 1, limits=limits)
    await stand.tick(10_000)
    assert await stand.ledger.reserve(stand.request("s3", 1, limits=limits)) == Refused("requests", 98, 2, 30_000)
    await stand.tick(30_000 - 1)
    assert await stand.ledger.reserve(stand.request("s3", 1, limits=limits)) == Refused("requests", 98, 2, 1)
    await stand.tick(1)
    await stand.hold("s3", 1, limits=limits)
    assert await stand.ledger.reserve(stand.request("s4", 1, limits=limits)) == Refused("requests", 97, 3, 20_000)


async def test_a_changed_rate_counts_what_was_admitted_under_the_old_one(stand: Stand) -> None:
    await stand.grant("g", 100)
    for number in range(5):
        await stand.hold(f"s{number}", 1, limits=KeyLimits(requests_per_minute=5))
        await stand.tick(1_000)
    lower = KeyLimits(requests_per_minute=2)
    assert await stand.ledger.reserve(stand.request("n", 1, limits=lower)) == Refused("requests", 95, 5, 58_000)
    higher = KeyLimits(requests_per_minute=6)
    await stand.hold("n", 1, limits=higher)
    assert await stand.ledger.reserve(stand.request("o", 1, limits=higher)) == Refused("requests", 94, 6, 55_000)
    await stand.tick(60_000)
    for number in range(4):
        await stand.hold(f"t{number}", 1, limits=KeyLimits(requests_per_minute=4))
    kept = [name for name in await stand.hash(stand.at.limits + "key") if name.startswith("w")]
    assert len(kept) <= 6


async def test_a_refused_call_counts_against_no_limit(stand: Stand) -> None:
    await stand.grant("g", 1)
    limits = KeyLimits(1, 1)
    for number in range(3):
        assert await stand.ledger.reserve(stand.request(f"s{number}", 2, limits=limits)) == Refused("balance", 1, 0)
    await stand.hold("s9", 1, limits=limits)


async def test_a_limit_of_zero_admits_nothing(stand: Stand) -> None:
    await stand.grant("g", 1)
    for limits, reason in ((KeyLimits(0, None), "requests"), (KeyLimits(None, 0), "parallel")):
        answer = await stand.ledger.reserve(stand.request("s", 1, limits=limits))
        assert isinstance(answer, Refused)
        assert answer.reason == reason
