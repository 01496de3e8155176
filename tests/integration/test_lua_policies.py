"""What accounts may do when their grants are used up: cutoff, grace and postpaid, with an injected clock."""

from __future__ import annotations

import pytest

from metering.ledger import (
    Balance,
    Gone,
    Held,
    LedgerError,
    Policy,
    PolicyChange,
    PolicySet,
    Progressed,
    Refused,
    SessionRef,
    Settled,
)
from storage.redis_client import RedisReplyError
from tests.support.valkey import WALL, Stand

BIG = 2**53 - 1


async def allow(stand: Stand, limit: int, policy: Policy = "postpaid", revision: int = 1) -> PolicySet:
    return await stand.ledger.set_policy(PolicyChange(stand.account, policy, limit, revision))


async def balance(stand: Stand) -> tuple[int, int, int, int, int]:
    """available, held, debt, charged, line; with the invariants that hold at every instant."""
    seen = await stand.ledger.snapshot(stand.account)
    now, grants = seen.balance, seen.grants
    consumed = sum(grant.consumed for grant in grants.values())
    assert now.held == sum(grant.held for grant in grants.values()) + now.line  # I3
    assert now.line == sum(session.line for session in seen.sessions.values())
    assert now.charged == consumed + now.debt  # I5
    assert now.available == sum(grant.available for grant in grants.values())  # I2
    assert not now.debt or not now.available  # I6
    return now.available, now.held, now.debt, now.charged, now.line


# --- the verb


async def test_a_policy_is_set_on_an_account_that_has_no_grants_yet_and_journalled(stand: Stand) -> None:
    assert await allow(stand, 70, "grace") == PolicySet(True, 0, 0, 1)
    assert await stand.ledger.balance(stand.account) == Balance(0, 0, 0, 0, 0, 0, 70, "grace")
    assert await stand.entries() == [
        ("1-1", {"t": "policy", "u": "acc", "ts": str(WALL), "pl": "grace", "a": "70", "r": "1"})
    ]


async def test_a_repeated_change_is_made_once(stand: Stand) -> None:
    await allow(stand, 70)
    await stand.grant("g", 5)
    before = await stand.state()
    assert await allow(stand, 70) == PolicySet(True, 0, 0, 1)
    assert await stand.state() == before


async def test_a_late_repeat_does_not_undo_a_newer_change(stand: Stand) -> None:
    await allow(stand, 70, revision=1)
    await allow(stand, 90, "grace", revision=2)
    before = await stand.state()
    assert await allow(stand, 70, revision=1) == PolicySet(False, 0, 0, 2)
    assert await stand.state() == before


@pytest.mark.parametrize(
    ("policy", "limit", "revision"),
    [("cutoff", "1", "1"), ("other", "1", "1"), ("", "1", "1"), ("grace", str(BIG + 1), "1"), ("grace", "1", "0")],
)
async def test_a_policy_out_of_its_bounds_is_refused(stand: Stand, policy: str, limit: str, revision: str) -> None:
    before = await stand.state()
    assert (await stand.run("policy", policy=policy, limit=limit, revision=revision))[0] == b"BOUNDS"
    assert await stand.state() == before
    if policy == "cutoff":
        with pytest.raises(LedgerError, match="limit"):
            await allow(stand, 1, "cutoff")


# --- holds


@pytest.mark.parametrize("policy", ["grace", "postpaid"])
async def test_a_hold_takes_grants_first_and_then_the_line(stand: Stand, policy: Policy) -> None:
    await stand.grant("g", 60)
    await allow(stand, 100, policy)
    assert await stand.ledger.reserve(stand.request("s1", 50)) == Held(50, 10, WALL, 15_000)
    assert await balance(stand) == (10, 50, 0, 0, 0)
    assert await stand.ledger.reserve(stand.request("s2", 50)) == Held(50, 0, WALL, 15_000)
    assert await balance(stand) == (0, 100, 0, 0, 40)
    stored = await stand.hash(stand.at.session + "s2")
    assert (stored["h"], stored["sl"], stored["hl"]) == ("50", "g=10", "40")


async def test_a_hold_is_cut_to_what_grants_and_line_give_together(stand: Stand) -> None:
    await stand.grant("g", 60)
    await allow(stand, 30)
    assert await stand.ledger.reserve(stand.request("s1", 100, 90)) == Held(90, 0, WALL, 15_000)
    assert await balance(stand) == (0, 90, 0, 0, 30)


async def test_too_little_of_grants_and_line_together_refuses_and_stores_nothing(stand: Stand) -> None:
    await stand.grant("g", 60)
    await allow(stand, 30)
    before = await stand.state()
    assert await stand.ledger.reserve(stand.request("s1", 91)) == Refused("balance", 90, 0)
    assert await stand.state() == before
    await stand.hold("s1", 80)
    assert await stand.ledger.reserve(stand.request("s2", 11)) == Refused("in_flight", 10, 80, 1_000)


async def test_a_repeated_reserve_holds_its_part_of_the_line_once(stand: Stand) -> None:
    await allow(stand, 100)
    request = stand.request("s1", 40)
    await stand.ledger.reserve(request)
    assert await stand.ledger.reserve(request) == Held(40, 0, WALL, 15_000, repeated=True)
    assert await balance(stand) == (0, 40, 0, 0, 40)


async def test_debt_admits_more_until_debt_and_held_line_reach_the_limit(stand: Stand) -> None:
    await allow(stand, 100)
    first = await stand.hold("s1", 60)
    await stand.ledger.settle(first, 60, "completed")
    assert await stand.ledger.reserve(stand.request("s2", 41)) == Refused("balance", 40, 0)
    second = await stand.hold("s2", 40)
    assert await balance(stand) == (0, 40, 60, 60, 40)
    assert await stand.ledger.reserve(stand.request("s3", 1)) == Refused("debt", 0, 40)
    await stand.ledger.settle(second, 39, "completed")
    assert await balance(stand) == (0, 0, 99, 99, 0)
    assert await stand.ledger.reserve(stand.request("s3", 1)) == Held(1, 0, WALL, 15_000)


async def test_a_limit_below_the_debt_admits_nothing_and_lets_open_holds_finish(stand: Stand) -> None:
    await allow(stand, 100)
    first = await stand.hold("s1", 50)
    second = await stand.hold("s2", 30)
    await stand.ledger.settle(first, 50, "completed")
    assert await allow(stand, 20, revision=2) == PolicySet(True, 50, 30, 3)
    assert await stand.ledger.reserve(stand.request("s3", 1)) == Refused("debt", 0, 30)
    assert await stand.ledger.progress(second, 1, 25, 60) == Progressed(30, 0)  # no further extension
    assert await stand.ledger.settle(second, 35, "completed") == Settled(30, 5, 0, 4)  # what it held, not a micro more
    assert await balance(stand) == (0, 0, 80, 80, 0)


async def test_back_under_cutoff_debt_refuses_until_it_is_repaid(stand: Stand) -> None:
    await allow(stand, 100)
    ref = await stand.hold("s1", 50)
    await stand.ledger.settle(ref, 50, "completed")
    await allow(stand, 0, "cutoff", revision=2)
    assert await stand.ledger.reserve(stand.request("s2", 1)) == Refused("debt", 0, 0)
    await stand.grant("g", 51)
    assert await stand.ledger.reserve(stand.request("s2", 1)) == Held(1, 0, WALL, 15_000)


# --- extensions


async def test_an_extension_goes_on_into_the_line(stand: Stand) -> None:
    await stand.grant("g", 30)
    await allow(stand, 50)
    ref = await stand.hold("s1", 10)
    assert await stand.ledger.progress(ref, 1, 5, 45) == Progressed(45, 0)
    assert await balance(stand) == (0, 45, 0, 0, 15)
    assert await stand.ledger.progress(ref, 2, 40, 100) == Progressed(80, 0)
    assert await balance(stand) == (0, 80, 0, 0, 50)
    stored = await stand.hash(stand.at.session + "s1")
    assert (stored["h"], stored["sl"], stored["hl"]) == ("80", "g=30", "50")


async def test_a_blocked_account_gets_nothing_of_its_line(stand: Stand) -> None:
    await allow(stand, 50)
    ref = await stand.hold("s1", 10)
    await stand.client.call("HSET", stand.at.account + "acc", "blk", 1)
    assert await stand.ledger.progress(ref, 1, 5, 45) == Progressed(10, 0)
    assert await stand.ledger.reserve(stand.request("s2", 1)) == Refused("blocked", 0, 10)


# --- endings


async def mixed(stand: Stand) -> SessionRef:
    """A session that holds 30 of a grant and 50 of a line of 60."""
    await stand.grant("g", 30)
    await allow(stand, 60)
    return await stand.hold("s1", 80)


@pytest.mark.parametrize(
    ("charge", "debt", "absorbed"),
    [(0, 0, 0), (20, 0, 0), (30, 0, 0), (31, 1, 0), (80, 50, 0), (90, 60, 0), (91, 60, 1), (500, 60, 410)],
)
async def test_a_settlement_spends_grants_then_the_line_and_frees_the_rest(
    stand: Stand, charge: int, debt: int, absorbed: int
) -> None:
    ref = await mixed(stand)
    paid = charge - absorbed
    left = max(0, 30 - charge)
    assert await stand.ledger.settle(ref, charge, "completed") == Settled(paid, absorbed, left, 3)
    assert await balance(stand) == (left, 0, debt, paid, 0)
    entry = (await stand.entries())[-1][1]
    spent = min(30, charge)
    assert (entry["c"], entry["d"], entry["ab"]) == (str(paid), str(debt), str(absorbed))
    assert entry["sl"] == (f"g={spent}" if spent else "")
    before = await stand.state()
    assert await stand.ledger.settle(ref, charge, "completed") == Settled(paid, absorbed, left, 3, repeated=True)
    assert await stand.state() == before


async def test_credit_that_came_back_meanwhile_is_spent_before_there_is_debt(stand: Stand) -> None:
    await stand.grant("g", 50)
    await allow(stand, 60)
    on_grant = await stand.hold("s1", 50)
    on_line = await stand.hold("s2", 40)
    await stand.ledger.settle(on_grant, 20, "completed")
    assert await stand.ledger.settle(on_line, 40, "completed") == Settled(40, 0, 0, 4)
    assert await balance(stand) == (0, 0, 10, 60, 0)


async def test_a_void_frees_all_of_grants_and_line(stand: Stand) -> None:
    ref = await mixed(stand)
    assert await stand.ledger.void(ref) == Settled(0, 0, 30, 3)
    assert await balance(stand) == (30, 0, 0, 0, 0)


async def test_a_sweep_turns_what_was_metered_on_the_line_into_debt(stand: Stand) -> None:
    ref = await mixed(stand)
    await stand.ledger.progress(ref, 1, 45, 0)
    await stand.tick(15_000)
    (swept,) = await stand.ledger.sweep_due(stand.at.number, 5)
    assert (swept.charged, swept.absorbed) == (45, 0)
    assert await balance(stand) == (0, 0, 15, 45, 0)
    assert await stand.ledger.settle(ref, 60, "completed") == Gone("final", 45)


async def test_a_new_grant_repays_debt_first(stand: Stand) -> None:
    await allow(stand, 100)
    ref = await stand.hold("s1", 70)
    await stand.ledger.settle(ref, 70, "completed")
    part = await stand.grant("g1", 30)
    assert (part.repaid, part.available) == (30, 0)
    assert await balance(stand) == (0, 0, 40, 70, 0)
    rest = await stand.grant("g2", 50)
    assert (rest.repaid, rest.available) == (40, 10)
    assert await balance(stand) == (10, 0, 0, 70, 0)


async def test_what_a_session_gives_back_repays_the_debt_that_another_made(stand: Stand) -> None:
    await stand.grant("g", 50)
    await allow(stand, 60)
    on_grant = await stand.hold("s1", 50)
    on_line = await stand.hold("s2", 40)
    await stand.ledger.settle(on_line, 40, "completed")
    assert await balance(stand) == (0, 50, 40, 40, 0)
    await stand.ledger.settle(on_grant, 5, "completed")
    assert await balance(stand) == (5, 0, 0, 45, 0)


async def test_under_cutoff_nothing_ever_becomes_debt(stand: Stand) -> None:
    await stand.grant("g", 30)
    await allow(stand, 0, "cutoff")
    ref = await stand.hold("s1", 50, 10)
    assert await stand.ledger.progress(ref, 1, 30, 60) == Progressed(30, 0)
    assert await stand.ledger.settle(ref, 500, "completed") == Settled(30, 470, 0, 3)
    assert await balance(stand) == (0, 0, 0, 30, 0)
    assert await stand.ledger.reserve(stand.request("s2", 1)) == Refused("balance", 0, 0)


async def test_a_line_of_the_largest_amount_stays_exact(stand: Stand) -> None:
    await stand.grant("g", 7)
    await allow(stand, BIG)
    ref = await stand.hold("s1", BIG, 1)
    assert await balance(stand) == (0, BIG, 0, 0, BIG - 7)
    assert await stand.ledger.settle(ref, BIG, "completed") == Settled(BIG, 0, 0, 3)
    assert await balance(stand) == (0, 0, BIG - 7, BIG, 0)
    assert isinstance(await stand.ledger.reserve(stand.request("s2", 1)), Refused)


@pytest.mark.parametrize("damage", ["nan", "-5", "1e3", str(BIG + 1)])
@pytest.mark.parametrize(("key", "field"), [("account", "lim"), ("account", "hc"), ("session", "hl")])
async def test_a_damaged_line_stops_the_settlement_whole(stand: Stand, key: str, field: str, damage: str) -> None:
    await mixed(stand)
    await stand.client.call("HSET", str(stand.keys("settle")[key]), field, damage)
    before = await stand.state()
    with pytest.raises(RedisReplyError, match="BROKEN"):
        await stand.run("settle")
    assert await stand.state() == before


async def test_a_line_that_holds_less_than_its_session_stops_the_settlement_whole(stand: Stand) -> None:
    await mixed(stand)
    await stand.client.call("HSET", stand.at.account + "acc", "hc", 49)
    before = await stand.state()
    with pytest.raises(RedisReplyError, match="BROKEN"):
        await stand.run("settle")
    assert await stand.state() == before


TOUCHED = ("account", "grants", "session", "leases", "limits", "outbox")


# A void gives back, so it never walks the burn order.
@pytest.mark.parametrize(
    ("script", "key"), [("settle", "order"), *((s, k) for s in ("settle", "void") for k in TOUCHED)]
)
async def test_a_key_of_the_wrong_type_stops_an_ending_on_the_line_whole(stand: Stand, script: str, key: str) -> None:
    await mixed(stand)
    name = str(stand.keys(script)[key])
    await stand.client.call("DEL", name)
    await stand.client.call("SET", name, "poison")
    before = await stand.state()
    with pytest.raises(RedisReplyError, match="WRONGTYPE"):
        await stand.run(script, **({"charge": "70"} if script == "settle" else {}))
    assert await stand.state() == before
