"""Scenarios of what begins and carries a session: init, due, audit, reserve with its limits, progress.

Must not: hold anything but scenarios; `lua_scenarios` says what one is.
"""

from __future__ import annotations

import msgspec

from metering.ledger import (
    AccountRef,
    Gone,
    GrantRequest,
    Held,
    KeyLimits,
    Past,
    Progressed,
    Refused,
    Repeated,
    SessionRef,
    Settled,
)
from tests.support.lua_scenarios import (
    DAY_MS,
    LEASE_MS,
    account,
    adds_up,
    grant_of,
    lease,
    saved_clock,
    scenario,
    session,
    stops,
    unchanged,
)
from tests.support.valkey import SHARD, WALL, Stand

HASH = "a" * 64


@scenario
async def a_hold_moves_credit_and_opens_a_session(stand: Stand) -> None:
    await stand.grant("g", 100)
    assert await stand.ledger.reserve(stand.request("s1", 60)) == Held(60, 40, WALL, LEASE_MS)
    assert await stand.ledger.reserve(stand.request("s2", 30, 20)) == Held(30, 10, WALL, LEASE_MS)
    figures = await account(stand)
    assert (figures["av"], figures["hd"], figures["ns"]) == (10, 90, 2)
    assert (await grant_of(stand, "g"))["h"] == 90
    assert await session(stand, "s1", "st", "f", "h", "m", "q", "sl") == ["H", str(WALL), "60", "0", "0", "g=60"]
    assert await lease(stand, "s1") == WALL + LEASE_MS
    assert await stand.client.call("PTTL", stand.at.session + "s1") == -1
    await adds_up(stand)


@scenario
async def a_short_hold_is_taken_down_to_the_minimum_and_not_below(stand: Stand) -> None:
    await stand.grant("g", 50)
    await unchanged(stand, "reserve", [b"BALANCE", b"50", b"0", b"0"], want="100", minimum="51")
    assert (await stand.run("reserve", want="100", minimum="50"))[:3] == [b"HELD", 50, 0]
    before = await stand.state()
    assert await stand.ledger.reserve(stand.request("s2", 60, 50)) == Refused("in_flight", 0, 50, 1_000)
    assert await stand.ledger.reserve(stand.request("s2", 60, 51)) == Refused("balance", 0, 50)
    assert await stand.state() == before


@scenario
async def another_epoch_is_refused(stand: Stand) -> None:
    await stand.grant("g", 50)
    for script in ("reserve", "settle", "grant", "due", "audit"):
        await unchanged(stand, script, [b"EPOCH"], ep="2")


@scenario
async def absurd_amounts_are_refused(stand: Stand) -> None:
    await stand.grant("g", 50)
    for absurd in ("1e3", "10x", "-1", str(2**53), ""):
        await unchanged(stand, "reserve", [b"BOUNDS"], want=absurd)
        await unchanged(stand, "reserve", [b"BOUNDS"], lease=absurd)
    await unchanged(stand, "reserve", [b"BOUNDS"], want="5", minimum="6")
    await unchanged(stand, "reserve", [b"BOUNDS"], lease="0")


@scenario
async def ids_with_separators_are_refused(stand: Stand) -> None:
    for wrong in ("a|b", "a=b", "a,b", "a:b", "", "x" * 65):
        await unchanged(stand, "reserve", [b"BOUNDS", b"id"], kid=wrong)
        await unchanged(stand, "grant", [b"BOUNDS", b"id"], gid=wrong)


@scenario
async def damage_stops_a_call_before_its_first_write(stand: Stand) -> None:
    await stand.grant("g", 50)
    await stand.client.call("HSET", stand.at.account + "acc", "hd", "5e1")
    await stops(stand, "reserve", "BROKEN")
    await stand.client.call("HSET", stand.at.account + "acc", "hd", "0")
    await stand.client.call("HSET", stand.at.grants + "acc", "g:a", "nan")
    await stops(stand, "reserve", "BROKEN")


@scenario
async def amounts_of_15_digits_stay_whole(stand: Stand) -> None:
    await stand.grant("g", 10**15)
    assert await stand.ledger.reserve(stand.request("s1", 10**14)) == Held(10**14, 9 * 10**14, WALL, LEASE_MS)
    assert await session(stand, "s1", "h", "sl") == [str(10**14), f"g={10**14}"]
    ref = SessionRef("s1", stand.account, "key", WALL)
    assert await stand.ledger.settle(ref, 10**14, "completed") == Settled(10**14, 0, 9 * 10**14, 2)
    await adds_up(stand)


@scenario
async def a_grant_is_spendable_until_its_millisecond(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=WALL + 10)
    await stand.tick(9)
    assert isinstance(await stand.ledger.reserve(stand.request("s1", 10)), Held)
    await stand.tick(1)
    assert await stand.ledger.reserve(stand.request("s2", 10)) == Refused("in_flight", 0, 10, 1_000)


@scenario
async def the_clock_never_goes_back(stand: Stand) -> None:
    await stand.grant("old", 100, expires_ms=WALL + 1_000)
    await stand.grant("g", 5, priority=60)
    await stand.wall(WALL + 2_000)
    ref = await stand.hold("s1", 1)
    assert await saved_clock(stand) == WALL + 2_000
    await stand.wall(WALL - 30_000)
    assert await stand.ledger.reserve(stand.request("s2", 100)) == Refused("balance", 4, 1)
    await stand.wall(WALL + 3_000)
    await stand.ledger.progress(ref, 1, 1, 0)
    assert await saved_clock(stand) == WALL + 3_000
    await stand.wall(WALL)
    await stand.ledger.progress(ref, 2, 1, 0)
    assert await lease(stand, "s1") == WALL + 3_000 + LEASE_MS


@scenario
async def grants_burn_in_their_order(stand: Stand) -> None:
    for gid, priority, expires, created in [
        ("d", 50, 0, 1), ("b0", 50, WALL + 9_000, 2), ("b2", 50, WALL + 9_000, 1), ("b1", 50, WALL + 9_000, 1),
        ("a", 9, 0, 9), ("e", 99, WALL + 9_000, 0),
    ]:  # fmt: skip
        await stand.ledger.grant(GrantRequest(gid, stand.account, 10, priority, expires, created))
    await stand.hold("s1", 55)
    assert await session(stand, "s1", "sl") == ["a=10,b1=10,b2=10,b0=10,d=10,e=5"]
    assert (await grant_of(stand, "e"))["h"] == 5
    await adds_up(stand)


@scenario
async def every_page_of_the_burn_order_is_read(stand: Stand) -> None:
    """Pages hold 1, 4, 16 and 64 grants: holds that empty the grants before each border, then one of all the rest."""
    for number in range(26):
        await stand.grant(f"g{number:02d}", 10, priority=number)
    for sid, want, slices in (("s1", 10, "g00"), ("s2", 40, "g01 g02 g03 g04"), ("s3", 15, "g05 g06")):
        await stand.hold(sid, want)
        found = (await session(stand, sid, "sl"))[0] or ""
        assert [part.partition("=")[0] for part in found.split(",")] == slices.split()
    assert isinstance(await stand.ledger.reserve(stand.request("s4", 195)), Held)
    assert (await account(stand))["av"] == 0
    await adds_up(stand)


@scenario
async def sessions_share_a_grant(stand: Stand) -> None:
    await stand.grant("g", 100)
    first, second = await stand.hold("s1", 30), await stand.hold("s2", 50)
    assert (await grant_of(stand, "g"))["h"] == 80
    await stand.ledger.settle(first, 10, "completed")
    assert (await grant_of(stand, "g")) == {"i": 100, "a": 40, "h": 50, "c": 10, "x": 0, "v": 0}
    await stand.ledger.settle(second, 50, "completed")
    assert (await grant_of(stand, "g")) == {"i": 100, "a": 40, "h": 0, "c": 60, "x": 0, "v": 0}
    await adds_up(stand)


@scenario
async def a_delayed_reserve_finds_the_tombstone(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.tick(7)
    assert await stand.ledger.void(SessionRef("s1", stand.account, "key", 0)) == Gone("unknown")
    assert await saved_clock(stand) == WALL + 7
    assert 0 < await stand.client.call("PTTL", stand.at.session + "s1") <= DAY_MS
    await unchanged(stand, "reserve", [b"TOMBSTONE", b"100", b"0"])
    await unchanged(stand, "settle", [b"UNKNOWN"])
    await unchanged(stand, "void", [b"TOMBSTONE"])
    assert (await account(stand))["hd"] == 0


@scenario
async def a_finished_session_is_not_reserved_again(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.ledger.settle(await stand.hold("s1", 60), 10, "completed")
    await unchanged(stand, "reserve", [b"FINISHED", b"90", b"0"])


@scenario
async def a_repeated_reserve_answers_what_is_held(stand: Stand) -> None:
    await stand.grant("g", 70)
    request = stand.request("s1", 100, 10, limits=KeyLimits(5, 1))
    assert isinstance(await stand.ledger.reserve(request), Held)
    await stand.tick(1_000)
    before = await stand.state()
    assert await stand.ledger.reserve(request) == Held(70, 0, WALL, LEASE_MS - 1_000, repeated=True)
    assert await stand.state() == before


@scenario
async def a_session_of_somebody_else_is_a_conflict(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 60)
    for field in ("body_hash", "owner", "key"):
        answer = await stand.ledger.reserve(stand.request("s1", 60, None, **{field: "else"}))
        assert answer == Refused("conflict", 40, 60), field


@scenario
async def a_blocked_account_begins_and_extends_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    await stand.client.call("HSET", stand.at.account + "acc", "blk", 1)
    assert await stand.ledger.reserve(stand.request("s2", 1)) == Refused("blocked", 90, 10)
    assert await stand.ledger.progress(ref, 1, 1, 90) == Progressed(10, 90)


@scenario
async def an_indebted_account_begins_nothing(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.client.call("HSET", stand.at.account + "acc", "db", 3)
    await unchanged(stand, "reserve", [b"DEBT"])


@scenario
async def requests_slide_over_a_minute(stand: Stand) -> None:
    await stand.grant("g", 100)
    limits = KeyLimits(requests_per_minute=2)
    await stand.hold("s1", 1, limits=limits)
    await stand.tick(20_000)
    await stand.hold("s2", 1, limits=limits)
    await stand.tick(10_000)
    assert await stand.ledger.reserve(stand.request("s3", 1, limits=limits)) == Refused("requests", 98, 2, 30_000)
    await stand.tick(29_999)
    assert await stand.ledger.reserve(stand.request("s3", 1, limits=limits)) == Refused("requests", 98, 2, 1)
    await stand.tick(1)
    await stand.hold("s3", 1, limits=limits)
    assert await stand.ledger.reserve(stand.request("s4", 1, limits=limits)) == Refused("requests", 97, 3, 20_000)
    assert await stand.ledger.reserve(stand.request("s4", 1, limits=KeyLimits(0))) == Refused("requests", 97, 3)


@scenario
async def old_admissions_are_forgotten_and_young_ones_kept(stand: Stand) -> None:
    await stand.grant("g", 100)
    for number in range(6):
        await stand.hold(f"s{number}", 1, limits=KeyLimits(requests_per_minute=3))
        await stand.tick(20_000)
    kept = {name for name in await stand.hash(stand.at.limits + "key") if name.startswith("w")}
    assert kept == {"w3", "w4", "w5"}


@scenario
async def parallel_sessions_are_counted_until_they_end(stand: Stand) -> None:
    await stand.grant("g", 100)
    for limits in (KeyLimits(parallel_sessions=2), KeyLimits(60, 2)):
        refs = [await stand.hold(f"s{number}-{limits.requests_per_minute}", 1, limits=limits) for number in (1, 2)]
        answer = await stand.ledger.reserve(stand.request("s3", 1, limits=limits))
        assert answer == Refused("parallel", 98, 2, 1_000)
        for ref in refs:
            await stand.ledger.void(ref)


@scenario
async def one_session_has_the_idempotency_key(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.ledger.reserve(stand.request("s1", 10, idempotency=HASH))
    assert 0 < await stand.client.call("PTTL", f"{stand.at.idempotency}acc:{HASH}") <= DAY_MS
    assert await stand.ledger.reserve(stand.request("s2", 10, idempotency=HASH)) == Repeated("s1", True)
    other = stand.request("s2", 10, idempotency=HASH, body_hash="other")
    assert await stand.ledger.reserve(other) == Repeated("s1", False)
    await stand.ledger.void(SessionRef("s1", stand.account, "key", WALL))
    assert await stand.ledger.past(stand.account, "s1") == Past("void", 0)
    assert isinstance(await stand.ledger.reserve(stand.request("s2", 10, idempotency=HASH, past="s1")), Held)
    assert await stand.ledger.reserve(stand.request("s3", 10, idempotency=HASH, past="s1")) == Repeated("s2", True)


# --- progress


@scenario
async def progress_extends_to_want_and_renews_the_lease(stand: Stand) -> None:
    await stand.grant("one", 15, priority=1)
    await stand.grant("two", 100, priority=2)
    ref = await stand.hold("s1", 10)
    await stand.tick(5_000)
    assert await stand.ledger.progress(ref, 1, 4, 40) == Progressed(40, 75)
    assert await session(stand, "s1", "h", "m", "q", "sl") == ["40", "4", "1", "one=15,two=25"]
    assert await lease(stand, "s1") == WALL + 5_000 + LEASE_MS
    assert await stand.ledger.progress(ref, 2, 30, 20) == Progressed(40, 75)
    assert await session(stand, "s1", "m", "q") == ["30", "2"]
    await adds_up(stand)
    assert await stand.ledger.progress(ref, 3, 30, 500) == Progressed(115, 0)
    await adds_up(stand)


@scenario
async def an_older_or_falling_progress_is_stale(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 10)
    await stand.ledger.progress(ref, 5, 8, 0)
    await stand.tick(1_000)
    for seq, metered in ((4, 9), (5, 9), (6, 7), (5, 7)):
        before = await stand.state()
        assert await stand.ledger.progress(ref, seq, metered, 90) == Progressed(10, 90, applied=False)
        assert await stand.state() == before
    assert await stand.ledger.progress(ref, 5, 8, 0) == Progressed(10, 90)
    assert await lease(stand, "s1") == WALL + 1_000 + LEASE_MS


@scenario
async def progress_needs_the_session_its_account_and_its_fence(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.grant("g2", 100, uid="two")
    ref = await stand.hold("s1", 10)
    before = await stand.state()
    assert await stand.ledger.progress(msgspec.structs.replace(ref, fence=1), 1, 1, 90) == Gone("fenced")
    stranger = msgspec.structs.replace(ref, account=AccountRef("two", SHARD))
    assert await stand.ledger.progress(stranger, 1, 1, 90) == Gone("unknown")
    assert await stand.ledger.progress(msgspec.structs.replace(ref, session="s2"), 1, 1, 90) == Gone("unknown")
    assert await stand.state() == before
    await stand.ledger.settle(ref, 7, "completed")
    before = await stand.state()
    assert await stand.ledger.progress(ref, 1, 1, 90) == Gone("final", 7)
    assert await stand.state() == before


# --- init, due, audit


@scenario
async def init_leaves_a_shard_that_exists(stand: Stand) -> None:
    await stand.grant("g", 5)
    await unchanged(stand, "init", [b"EXISTS", b"1"], ep="7")


@scenario
async def due_lists_leases_from_the_millisecond_they_end(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 10)
    await stand.hold("s2", 10)
    await stand.tick(LEASE_MS - 1)
    assert await stand.run("due") == [b"DUE"]
    await stand.tick(1)
    assert await stand.run("due") == [b"DUE", b"acc|s1", b"acc|s2"]
    assert await stand.run("due", limit="1") == [b"DUE", b"acc|s1"]


@scenario
async def the_audit_shows_each_session_by_itself(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.hold("s1", 10)
    await stand.tick(3)
    await stand.hold("s2", 20)
    seen = await stand.ledger.snapshot(stand.account)
    assert {sid: one.held for sid, one in seen.sessions.items()} == {"s1": 10, "s2": 20}
    assert {sid: one.lease_until_ms for sid, one in seen.sessions.items()} == {
        "s1": WALL + LEASE_MS, "s2": WALL + 3 + LEASE_MS,
    }  # fmt: skip
    assert (seen.epoch, seen.entry, seen.now_ms, seen.burn_order) == (1, 1, WALL + 3, ("g",))
