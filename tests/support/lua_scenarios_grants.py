"""Scenarios of what ends a grant's credit: expire, expiring, revoke, take.

Must not: hold anything but scenarios; `lua_scenarios` says what one is.
"""

from __future__ import annotations

from metering.ledger import GrantRefused, GrantRequest, Settled
from tests.support.lua_scenarios import account, adds_up, grant_of, last_entry, saved_clock, scenario, unchanged
from tests.support.valkey import WALL, Stand


async def burn_order(stand: Stand) -> tuple[str, ...]:
    """The grants that can be spent, in their order."""
    return (await stand.ledger.snapshot(stand.account)).burn_order


async def expiries(stand: Stand) -> list[bytes]:
    """The grants that wait for their time."""
    found: list[bytes] = await stand.client.call("ZRANGE", stand.at.expiries, 0, -1)
    return found


@scenario
async def what_nobody_holds_breaks_at_its_millisecond(stand: Stand) -> None:
    await stand.grant("g", 100, priority=1, expires_ms=WALL + 10)
    await stand.grant("h", 50, priority=2)
    ref = await stand.hold("s1", 30)
    await stand.tick(9)
    assert await stand.run("expiring") == [b"DUE"]
    await unchanged(stand, "expire", [b"NOTDUE", b"1"], gid="g")
    await stand.tick(1)
    assert await stand.run("expiring") == [b"DUE", b"acc|g"]
    assert await stand.run("expire", gid="g") == [b"EXPIRED", b"70", b"50", b"3"]
    assert await grant_of(stand, "g") == {"i": 100, "a": 0, "h": 30, "c": 0, "x": 70, "v": 0}
    fields = await last_entry(stand)
    assert (fields["t"], fields["g"], fields["a"], fields["ts"]) == ("expire", "g", "70", str(WALL + 10))
    assert await saved_clock(stand) == WALL + 10
    assert (await burn_order(stand), await expiries(stand)) == (("h",), [])
    await adds_up(stand)
    await unchanged(stand, "expire", [b"DONE"], gid="g")
    assert await stand.ledger.settle(ref, 10, "completed") == Settled(10, 0, 50, 4)
    assert (await grant_of(stand, "g"))["x"] == 90
    await adds_up(stand)


@scenario
async def a_returned_hold_breaks_at_its_grants_expiry(stand: Stand) -> None:
    """A hold returns to a grant before its time; the breakage of a second hold comes on top of that of the first."""
    await stand.grant("g", 100, expires_ms=WALL + 10)
    refs = [await stand.hold(f"s{number}", 30) for number in (1, 2, 3)]
    await stand.ledger.void(refs[0])
    await stand.tick(10)
    await stand.ledger.void(refs[1])
    assert await stand.run("expire", gid="g") == [b"EXPIRED", b"40", b"0", b"4"]
    assert (await grant_of(stand, "g"))["x"] == 70
    await stand.ledger.void(refs[2])
    assert (await grant_of(stand, "g"))["x"] == 100
    await adds_up(stand)


@scenario
async def an_expiry_without_credit_is_dropped(stand: Stand) -> None:
    await stand.client.call("ZADD", stand.at.expiries, 1, "acc|ghost")
    assert await stand.run("expire", gid="ghost") == [b"UNKNOWN"]
    await stand.grant("g", 10, expires_ms=WALL + 10)
    await stand.ledger.settle(await stand.hold("s1", 10), 10, "completed")
    await stand.tick(15)
    assert await stand.run("expire", gid="g") == [b"DONE"]
    assert await expiries(stand) == []
    assert await saved_clock(stand) == WALL + 15
    await adds_up(stand)


@scenario
async def expiring_lists_the_longest_over_first_up_to_its_limit(stand: Stand) -> None:
    await stand.grant("late", 10, expires_ms=WALL + 9)
    await stand.grant("early", 10, expires_ms=WALL + 5)
    await stand.tick(9)
    assert await stand.run("expiring") == [b"DUE", b"acc|early", b"acc|late"]
    assert await stand.run("expiring", limit="1") == [b"DUE", b"acc|early"]


@scenario
async def a_revoked_grant_is_voided_now_and_when_its_holds_end(stand: Stand) -> None:
    await stand.grant("g", 100, priority=1, expires_ms=WALL + 10)
    await stand.grant("h", 50, priority=2)
    ref = await stand.hold("s1", 30)
    assert await stand.run("revoke", gid="g") == [b"REVOKED", b"70", b"50", b"3"]
    assert await grant_of(stand, "g") == {"i": 100, "a": 0, "h": 30, "c": 0, "x": 0, "v": 70}
    fields = await last_entry(stand)
    assert (fields["t"], fields["g"], fields["a"]) == ("revoke", "g", "70")
    assert (await burn_order(stand), await expiries(stand)) == (("h",), [])
    await adds_up(stand)
    await unchanged(stand, "revoke", [b"EXISTS", b"70", b"50", b"3"], gid="g")
    assert await stand.ledger.settle(ref, 10, "completed") == Settled(10, 0, 50, 4)
    assert await grant_of(stand, "g") == {"i": 100, "a": 0, "h": 0, "c": 10, "x": 0, "v": 90}
    assert (await last_entry(stand))["vd"] == "g=20"
    await adds_up(stand)


@scenario
async def revoked_credit_repays_no_debt(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 100)
    await stand.run("revoke", gid="g")
    await stand.client.call("HSET", stand.at.account + "acc", "db", 25, "tc", 25)
    assert await stand.ledger.void(ref) == Settled(0, 0, 0, 3)
    fields = await last_entry(stand)
    assert (fields["vd"], fields.get("rp")) == ("g=100", None)
    assert (await account(stand))["db"] == 25
    await adds_up(stand)


@scenario
async def a_grant_that_was_revoked_before_it_came_stays_out(stand: Stand) -> None:
    assert await stand.run("revoke", gid="g1") == [b"REVOKED", b"0", b"0", b"1"]
    before = await stand.state()
    assert await stand.ledger.grant(GrantRequest("g1", stand.account, 5)) == GrantRefused("revoked")
    assert await stand.state() == before


@scenario
async def an_adjustment_takes_what_is_available_in_burn_order(stand: Stand) -> None:
    await stand.grant("one", 30, priority=1)
    await stand.grant("two", 50, priority=2)
    await stand.hold("s1", 10)
    assert await stand.run("take", change="j1", debit="75") == [b"TAKEN", b"0", b"70", b"3"]
    assert await stand.run("take", change="j2", debit="40") == [b"TAKEN", b"40", b"30", b"4"]
    fields = await last_entry(stand)
    assert (fields["t"], fields["j"], fields["a"], fields["sl"]) == ("adjust", "j2", "40", "one=20,two=20")
    assert await stand.run("take", change="j3", debit="75", whole="0") == [b"TAKEN", b"30", b"0", b"5"]
    assert await grant_of(stand, "one") == {"i": 30, "a": 0, "h": 10, "c": 0, "x": 0, "v": 20}
    assert await grant_of(stand, "two") == {"i": 50, "a": 0, "h": 0, "c": 0, "x": 0, "v": 50}
    assert await burn_order(stand) == ("one",)
    await adds_up(stand)


@scenario
async def an_adjustment_is_decided_once(stand: Stand) -> None:
    await stand.grant("g", 100)
    assert await stand.run("take", change="j1", debit="700") == [b"TAKEN", b"0", b"100", b"2"]
    assert await stand.run("take", change="j2", debit="40") == [b"TAKEN", b"40", b"60", b"3"]
    await stand.grant("more", 1_000)
    await unchanged(stand, "take", [b"EXISTS", b"0", b"1060", b"2"], change="j1", debit="700")
    await unchanged(stand, "take", [b"EXISTS", b"40", b"1060", b"3"], change="j2", debit="40")
    await unchanged(stand, "take", [b"CONFLICT"], change="j2", debit="41")
    await unchanged(stand, "take", [b"CONFLICT"], change="j2", debit="40", whole="0")
