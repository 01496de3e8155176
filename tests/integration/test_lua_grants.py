"""How credit ends that nobody used: expire, revoke and take, on a real server with an injected clock."""

from __future__ import annotations

import dataclasses

import pytest

from metering.ledger import (
    AccountRef,
    Balance,
    ChangeRefused,
    Expired,
    Granted,
    GrantRefused,
    GrantRequest,
    GrantState,
    Held,
    LedgerError,
    Refused,
    Settled,
    Voided,
)
from tests.support.valkey import SHARD, WALL, Stand

ENDS = WALL + 1_000
BIG = 2**53 - 1


async def state_of(stand: Stand, gid: str) -> GrantState:
    return (await stand.ledger.snapshot(stand.account)).grants[gid]


async def expired(stand: Stand, limit: int = 50) -> list[tuple[str, int, int]]:
    """What one call of the expirer moved: (grant, amount, entry)."""
    return [(one.grant, one.amount, one.entry) for one in (await stand.ledger.expire_due(SHARD, limit))[1]]


# --- expire


@pytest.mark.parametrize(("offset", "moved"), [(-1, []), (0, [("g", 100, 2)]), (1, [("g", 100, 2)])])
async def test_a_grant_expires_at_the_millisecond_its_time_is_over(
    stand: Stand, offset: int, moved: list[tuple[str, int, int]]
) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    await stand.wall(ENDS + offset)
    due = await stand.run("expiring")
    assert due == ([b"DUE", b"acc|g"] if moved else [b"DUE"])
    assert await stand.run("expire", gid="g") == (
        [b"EXPIRED", b"100", b"0", b"2"] if moved else [b"NOTDUE", b"%d" % -offset]
    )


async def test_what_expires_is_breakage_in_the_journal_and_leaves_balance_order_and_list(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    await stand.grant("h", 5)
    await stand.wall(ENDS + 7)
    assert await stand.ledger.expire_due(SHARD, 10) == (1, [Expired("g", stand.account, 100, 3)])
    assert (await stand.entries())[-1] == (
        "1-3", {"t": "expire", "u": "acc", "ts": str(ENDS + 7), "g": "g", "a": "100"}
    )  # fmt: skip
    seen = await stand.ledger.snapshot(stand.account)
    assert (seen.balance.available, seen.burn_order) == (5, ("h",))
    assert seen.grants["g"] == GrantState(100, 0, 0, 0, 100, 0, ENDS)
    assert await stand.client.call("EXISTS", stand.at.expiries) == 0


async def test_expiring_again_changes_nothing(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    await stand.wall(ENDS)
    await stand.ledger.expire_due(SHARD, 10)
    before = await stand.state()
    assert await stand.run("expire", gid="g") == [b"DONE"]
    assert await stand.ledger.expire_due(SHARD, 10) == (0, [])
    assert await stand.state() == before


async def test_what_a_session_holds_of_an_expired_grant_it_may_spend_and_its_rest_breaks(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    ref = await stand.hold("s1", 60)
    await stand.wall(ENDS)
    assert await expired(stand) == [("g", 40, 2)]
    assert await state_of(stand, "g") == GrantState(100, 0, 60, 0, 40, 0, ENDS)
    assert await stand.ledger.settle(ref, 25, "completed") == Settled(25, 0, 0, 3)
    assert (await stand.entries())[-1][1]["br"] == "g=35"
    assert await state_of(stand, "g") == GrantState(100, 0, 0, 25, 75, 0, ENDS)
    assert await stand.ledger.balance(stand.account) == Balance(0, 0, 0, 25, 0)


async def test_what_broke_at_a_session_s_end_and_what_expires_later_add_up(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    ref = await stand.hold("s1", 60)
    await stand.wall(ENDS)
    await stand.ledger.settle(ref, 25, "completed")
    assert await state_of(stand, "g") == GrantState(100, 40, 0, 25, 35, 0, ENDS)
    assert await expired(stand) == [("g", 40, 3)]
    assert await state_of(stand, "g") == GrantState(100, 0, 0, 25, 75, 0, ENDS)


async def test_a_grant_that_sessions_hold_whole_is_due_once_and_needs_no_entry(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    ref = await stand.hold("s1", 100)
    await stand.wall(ENDS)
    assert await stand.ledger.expire_due(SHARD, 10) == (1, [])
    assert await stand.ledger.expire_due(SHARD, 10) == (0, [])
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ()
    await stand.ledger.void(ref)
    assert [fields["t"] for _, fields in await stand.entries()] == ["grant", "settle"]
    assert (await state_of(stand, "g")).expired == 100


async def test_a_spent_grant_leaves_the_list_of_expiries_without_an_entry(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    await stand.ledger.settle(await stand.hold("s1", 100), 100, "completed")
    await stand.wall(ENDS)
    assert await stand.ledger.expire_due(SHARD, 10) == (1, [])
    assert await stand.client.call("EXISTS", stand.at.expiries) == 0
    assert len(await stand.entries()) == 2


async def test_a_clock_that_goes_back_expires_what_was_due_before(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    await stand.grant("h", 10)
    await stand.wall(ENDS)
    await stand.hold("s1", 1)  # keeps the time
    await stand.wall(WALL - 60_000)
    assert await expired(stand) == [("g", 100, 3)]


async def test_due_grants_come_in_the_order_of_their_end_and_no_more_than_asked_for(stand: Stand) -> None:
    for gid, after in (("c", 3), ("a", 1), ("b", 2), ("never", 0)):
        await stand.grant(gid, 10, expires_ms=WALL + after if after else 0, uid=f"u{gid}")
    await stand.tick(2)
    assert await stand.run("expiring") == [b"DUE", b"ua|a", b"ub|b"]
    assert await expired(stand, limit=1) == [("a", 10, 5)]
    assert [gid for gid, _, _ in await expired(stand)] == ["b"]


@pytest.mark.parametrize("gid", ["ghost", "endless"])
async def test_an_expiry_without_a_grant_that_expires_is_dropped(stand: Stand, gid: str) -> None:
    await stand.grant("endless", 10)
    await stand.client.call("ZADD", stand.at.expiries, 1, f"acc|{gid}")
    assert await stand.run("expire", gid=gid) == [b"UNKNOWN"]
    assert await stand.client.call("EXISTS", stand.at.expiries) == 0
    assert (await stand.ledger.balance(stand.account)).available == 10


@pytest.mark.parametrize("damage", ["grant", "member"])
async def test_damage_is_an_error_and_keeps_no_other_grant_from_expiring(stand: Stand, damage: str) -> None:
    for gid in ("one", "two"):
        await stand.grant(gid, 10, expires_ms=ENDS)
    if damage == "grant":
        await stand.client.call("HSET", stand.at.grants + "acc", "one:a", "many")
    else:
        await stand.client.call("ZADD", stand.at.expiries, 1, b"no bar \xff")
    await stand.wall(ENDS)
    with pytest.raises(LedgerError, match="BROKEN" if damage == "grant" else "BOUNDS"):
        await stand.ledger.expire_due(SHARD, 10)
    assert (await stand.hash(stand.at.grants + "acc"))["two:x"] == "10"


# --- revoke


async def test_revoking_voids_what_nobody_holds_and_answers_a_repeat_the_same(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    await stand.grant("h", 5)
    await stand.ledger.settle(await stand.hold("s1", 30), 30, "completed")
    assert await stand.ledger.revoke(stand.account, "g") == Voided(70, 5, 4)
    assert (await stand.entries())[-1] == ("1-4", {"t": "revoke", "u": "acc", "ts": str(WALL), "g": "g", "a": "70"})
    seen = await stand.ledger.snapshot(stand.account)
    assert seen.grants["g"] == GrantState(100, 0, 0, 30, 0, 70, ENDS, revoked=True)
    assert (seen.balance.available, seen.burn_order) == (5, ("h",))
    assert await stand.client.call("EXISTS", stand.at.expiries) == 0
    before = await stand.state()
    assert await stand.ledger.revoke(stand.account, "g") == Voided(70, 5, 4, repeated=True)
    assert await stand.state() == before


async def test_what_a_session_holds_of_a_revoked_grant_it_may_spend_and_its_rest_is_voided(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 60)
    assert await stand.ledger.revoke(stand.account, "g") == Voided(40, 0, 2)
    assert await state_of(stand, "g") == GrantState(100, 0, 60, 0, 0, 40, 0, revoked=True)
    assert await stand.ledger.settle(ref, 25, "completed") == Settled(25, 0, 0, 3)
    fields = (await stand.entries())[-1][1]
    assert (fields["sl"], fields["br"], fields["vd"]) == ("g=25", "", "g=35")
    assert await state_of(stand, "g") == GrantState(100, 0, 0, 25, 0, 75, 0, revoked=True)
    assert await stand.ledger.balance(stand.account) == Balance(0, 0, 0, 25, 0)


async def test_nothing_of_a_revoked_grant_extends_a_hold_or_pays_an_excess(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    await stand.ledger.revoke(stand.account, "g")
    assert getattr(await stand.ledger.progress(ref, 1, 5, 50), "held", None) == 10
    assert await stand.ledger.settle(ref, 40, "completed") == Settled(10, 30, 0, 3)
    assert await stand.ledger.reserve(stand.request("s2", 1)) == Refused("balance", 0, 0)


async def test_the_rest_of_a_revoked_grant_repays_no_debt(stand: Stand) -> None:
    await stand.grant("g", 100, priority=1)
    await stand.grant("h", 20, priority=2)
    ref = await stand.hold("s1", 120)
    await stand.ledger.revoke(stand.account, "g")
    await stand.client.call("HSET", stand.at.account + "acc", "db", 15, "tc", 15)
    assert await stand.ledger.void(ref) == Settled(0, 0, 5, 4)
    fields = (await stand.entries())[-1][1]
    assert (fields["vd"], fields["rp"]) == ("g=100", "h=15")


@pytest.mark.parametrize("first", ["expiry", "revocation"])
async def test_a_held_rest_is_voided_when_its_grant_is_revoked_whether_or_not_it_expired_too(
    stand: Stand, first: str
) -> None:
    await stand.grant("g", 100, expires_ms=ENDS)
    ref = await stand.hold("s1", 60)
    if first == "expiry":
        await stand.wall(ENDS)
        assert await expired(stand) == [("g", 40, 2)]
        assert await stand.ledger.revoke(stand.account, "g") == Voided(0, 0, 3)
    else:
        await stand.ledger.revoke(stand.account, "g")
        await stand.wall(ENDS)
        assert await stand.ledger.expire_due(SHARD, 10) == (0, [])
    await stand.ledger.void(ref)
    broken = 40 if first == "expiry" else 0
    assert await state_of(stand, "g") == GrantState(100, 0, 0, 0, broken, 100 - broken, ENDS, revoked=True)


async def test_a_grant_that_is_revoked_before_it_comes_stays_out(stand: Stand) -> None:
    assert await stand.ledger.revoke(stand.account, "g") == Voided(0, 0, 1)
    before = await stand.state()
    assert await stand.ledger.grant(GrantRequest("g", stand.account, 100)) == GrantRefused("revoked")
    assert await stand.state() == before
    assert (await stand.ledger.snapshot(stand.account)).grants == {}


async def test_repeating_a_revoked_grant_gives_nothing(stand: Stand) -> None:
    first = await stand.grant("g", 100)
    await stand.ledger.revoke(stand.account, "g")
    again = await stand.grant("g", 100)
    assert again == dataclasses.replace(first, available=0, repeated=True)


async def test_a_revoked_grant_makes_room_for_another(stand: Stand) -> None:
    for number in range(64):
        await stand.grant(f"g{number:02d}", 1)
    await stand.ledger.revoke(stand.account, "g63")
    assert isinstance(await stand.ledger.grant(GrantRequest("more", stand.account, 1)), Granted)


# --- take


async def test_taking_voids_in_burn_order_and_answers_a_repeat_the_same(stand: Stand) -> None:
    await stand.grant("late", 100, priority=60)
    await stand.grant("early", 30, priority=10)
    await stand.hold("s1", 10)
    assert await stand.ledger.take(stand.account, "j", 50) == Voided(50, 70, 3)
    assert (await stand.entries())[-1] == (
        "1-3", {"t": "adjust", "u": "acc", "ts": str(WALL), "j": "j", "a": "50", "sl": "early=20,late=30"}
    )  # fmt: skip
    assert await state_of(stand, "early") == GrantState(30, 0, 10, 0, 0, 20, 0)
    assert await state_of(stand, "late") == GrantState(100, 70, 0, 0, 0, 30, 0)
    before = await stand.state()
    assert await stand.ledger.take(stand.account, "j", 50) == Voided(50, 70, 3, repeated=True)
    assert await stand.state() == before


@pytest.mark.parametrize(("whole", "taken"), [(True, 0), (False, 90)])
async def test_more_than_there_is_takes_nothing_or_what_there_is(stand: Stand, whole: bool, taken: int) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 10)
    assert await stand.ledger.take(stand.account, "j", 91, whole=whole) == Voided(taken, 90 - taken, 2)
    assert (await state_of(stand, "g")).voided == taken
    await stand.grant("h", 500)
    again = await stand.ledger.take(stand.account, "j", 91, whole=whole)
    assert again == Voided(taken, 590 - taken, 2, repeated=True), "decided once, whatever comes later"


async def test_all_that_is_available_may_be_taken_and_drained_grants_leave_the_order(stand: Stand) -> None:
    await stand.grant("one", 10, priority=1)
    await stand.grant("two", 20, priority=2)
    ref = await stand.hold("s1", 15)  # all of one, 5 of two
    assert await stand.ledger.take(stand.account, "j", 15) == Voided(15, 0, 3)
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ("one", "two")
    await stand.ledger.void(ref)
    assert await stand.ledger.take(stand.account, "k", 15) == Voided(15, 0, 5)
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ()
    assert await stand.ledger.balance(stand.account) == Balance(0, 0, 0, 0, 0)


async def test_what_has_expired_is_not_taken(stand: Stand) -> None:
    await stand.grant("old", 50, priority=1, expires_ms=ENDS)
    await stand.grant("new", 50, priority=2)
    await stand.wall(ENDS)
    assert await stand.ledger.take(stand.account, "j", 60, whole=False) == Voided(50, 50, 3)
    assert await expired(stand) == [("old", 50, 4)]


@pytest.mark.parametrize(("amount", "whole"), [(51, True), (50, False)])
async def test_an_id_stands_for_one_adjustment_only(stand: Stand, amount: int, whole: bool) -> None:
    await stand.grant("g", 100)
    await stand.ledger.take(stand.account, "j", 50)
    before = await stand.state()
    assert await stand.ledger.take(stand.account, "j", amount, whole=whole) == ChangeRefused("conflict")
    assert await stand.state() == before


async def test_an_adjustment_may_have_the_id_of_a_grant(stand: Stand) -> None:
    await stand.grant("g", 100)
    assert await stand.ledger.take(stand.account, "g", 40) == Voided(40, 60, 2)
    assert await state_of(stand, "g") == GrantState(100, 60, 0, 0, 0, 40, 0)
    assert await stand.ledger.revoke(stand.account, "g") == Voided(60, 0, 3)
    assert (await state_of(stand, "g")).voided == 100


async def test_takes_add_up(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.ledger.take(stand.account, "j", 40)
    assert await stand.ledger.take(stand.account, "k", 25) == Voided(25, 35, 3)
    assert await state_of(stand, "g") == GrantState(100, 35, 0, 0, 0, 65, 0)


async def test_an_account_without_grants_has_nothing_to_take(stand: Stand) -> None:
    nobody = AccountRef("nobody", SHARD)
    assert await stand.ledger.take(nobody, "j", 5) == Voided(0, 0, 1)
    assert await stand.ledger.snapshot(nobody) == dataclasses.replace(
        await stand.ledger.snapshot(stand.account), entry=1
    )


@pytest.mark.parametrize("whole", ["", "2", "yes", "-1", "01"])
async def test_another_word_than_0_or_1_is_no_flag(stand: Stand, whole: str) -> None:
    await stand.grant("g0", 500)
    before = await stand.state()
    assert await stand.run("take", whole=whole) == [b"BOUNDS", b"whole"]
    assert await stand.state() == before


async def test_the_largest_amounts_stay_exact(stand: Stand) -> None:
    await stand.grant("g", BIG, expires_ms=ENDS)
    assert await stand.ledger.take(stand.account, "j", BIG - 10**14) == Voided(BIG - 10**14, 10**14, 2)
    await stand.wall(ENDS)
    assert await expired(stand) == [("g", 10**14, 3)]
    assert (await stand.entries())[-1][1]["a"] == "100000000000000"


# --- burn order


async def test_credit_burns_by_priority_then_expiry_then_age_then_id_also_when_it_is_taken(stand: Stand) -> None:
    for gid, priority, expires, created in [
        ("d", 50, 0, 1), ("c", 50, WALL + 9_000, 2), ("b2", 50, WALL + 9_000, 1), ("b1", 50, WALL + 9_000, 1),
        ("a", 9, 0, 9), ("e", 99, WALL + 1_000, 0), ("soon", 50, WALL + 8_999, 9),
    ]:  # fmt: skip
        await stand.ledger.grant(GrantRequest(gid, stand.account, 10, priority, expires, created))
    assert isinstance(await stand.ledger.reserve(stand.request("s1", 35)), Held)
    assert (await stand.hash(stand.at.session + "s1"))["sl"] == "a=10,soon=10,b1=10,b2=5"
    assert await stand.ledger.take(stand.account, "j", 35) == Voided(35, 0, 8)
    assert (await stand.entries())[-1][1]["sl"] == "b2=5,c=10,d=10,e=10"
