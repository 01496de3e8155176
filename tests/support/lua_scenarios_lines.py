"""Scenarios of the credit line, of corrections after a sweep, and of a shard's loss: policy, correct, reassert, freeze.

Must not: hold anything but scenarios; `lua_scenarios` says what one is.
"""

from __future__ import annotations

from typing import Any

from metering import scripts
from metering.ledger import Held, PolicyChange, PolicySet, Progressed, Refused, SessionRef, Settled
from metering.scripts import Word
from tests.support.lua_scenarios import (
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

HOUR_MS = 3_600_000


async def credit_line(stand: Stand, limit: int, revision: int = 1) -> PolicySet:
    """Set the test account's credit line."""
    return await stand.ledger.set_policy(PolicyChange(stand.account, "grace", limit, revision))


@scenario
async def a_policy_is_set_once_per_revision(stand: Stand) -> None:
    assert await credit_line(stand, 100, 2) == PolicySet(True, 0, 0, 1)
    row = await stand.hash(stand.at.account + "acc")
    assert (row["pol"], row["lim"]) == ("grace", "100")
    fields = await last_entry(stand)
    assert (fields["t"], fields["pl"], fields["a"]) == ("policy", "grace", "100")
    await unchanged(stand, "policy", [b"EXISTS", b"0", b"0", b"1"], limit="100", revision="2")
    await unchanged(stand, "policy", [b"STALE", b"0", b"0", b"1"], limit="7", revision="1")
    await unchanged(stand, "policy", [b"CONFLICT"], limit="7", revision="2")
    await unchanged(stand, "policy", [b"CONFLICT"], policy="postpaid", limit="100", revision="2")
    await unchanged(stand, "policy", [b"BOUNDS", b"limit"], policy="cutoff", limit="7", revision="3")
    await unchanged(stand, "policy", [b"BOUNDS", b"policy"], policy="free", revision="3")
    await stand.tick(5)
    assert (await credit_line(stand, 50, 3)).entry == 2
    assert await saved_clock(stand) == WALL + 5
    await adds_up(stand)


@scenario
async def a_hold_takes_grants_first_and_then_the_line(stand: Stand) -> None:
    await credit_line(stand, 50)
    await stand.grant("g", 30)
    first = await stand.hold("s1", 60)
    assert await session(stand, "s1", "h", "hl", "sl") == ["60", "30", "g=30"]
    assert await stand.ledger.reserve(stand.request("s2", 30, 10)) == Held(20, 0, WALL, LEASE_MS)
    figures = await account(stand)
    assert (figures["av"], figures["hd"], figures["hc"]) == (0, 80, 50)
    assert await stand.ledger.reserve(stand.request("s3", 1)) == Refused("in_flight", 0, 80, 1_000)
    await adds_up(stand)
    assert await stand.ledger.settle(first, 45, "completed") == Settled(45, 0, 0, 3)
    fields = await last_entry(stand)
    assert (fields["c"], fields["d"], fields["ab"], fields["sl"]) == ("45", "15", "0", "g=30")
    figures = await account(stand)
    assert (figures["db"], figures["tc"], figures["hc"], figures["hd"]) == (15, 45, 20, 20)
    await adds_up(stand)
    await stand.ledger.void(SessionRef("s2", stand.account, "key", WALL))
    assert await stand.ledger.reserve(stand.request("s4", 60, 1)) == Held(35, 0, WALL, LEASE_MS)
    await adds_up(stand)


@scenario
async def excess_uses_the_lines_free_room_and_then_the_house(stand: Stand) -> None:
    await credit_line(stand, 50)
    await stand.grant("g", 30)
    ref = await stand.hold("s1", 30)
    await stand.hold("s2", 20)
    assert await stand.ledger.settle(ref, 100, "completed") == Settled(60, 40, 0, 3)
    figures = await account(stand)
    assert (figures["db"], figures["tc"], figures["hc"], figures["hd"]) == (30, 60, 20, 20)
    await adds_up(stand)
    await unchanged(stand, "reserve", [b"DEBT", b"0", b"20", b"0"], sid="s3")
    await stand.grant("more", 100)
    assert (await account(stand))["db"] == 0
    await adds_up(stand)


@scenario
async def an_extension_goes_on_on_the_line(stand: Stand) -> None:
    await credit_line(stand, 50)
    await stand.grant("g", 30)
    ref = await stand.hold("s1", 20)
    assert await stand.ledger.progress(ref, 1, 1, 60) == Progressed(60, 0)
    assert await session(stand, "s1", "hl", "sl") == ["30", "g=30"]
    assert await stand.ledger.progress(ref, 2, 1, 90) == Progressed(80, 0)
    assert await session(stand, "s1", "hl", "h") == ["50", "80"]
    assert (await account(stand))["hc"] == 50
    await adds_up(stand)
    assert await stand.ledger.settle(ref, 80, "completed") == Settled(80, 0, 0, 3)
    figures = await account(stand)
    assert (figures["db"], figures["hc"], figures["hd"]) == (50, 0, 0)
    await adds_up(stand)


@scenario
async def a_limit_that_falls_leaves_what_is_held_and_no_room(stand: Stand) -> None:
    await credit_line(stand, 50)
    ref = await stand.hold("s1", 50)
    assert await credit_line(stand, 20, 2) == PolicySet(True, 0, 50, 2)
    assert await stand.ledger.reserve(stand.request("s2", 1)) == Refused("in_flight", 0, 50, 1_000)
    assert await stand.ledger.settle(ref, 60, "completed") == Settled(50, 10, 0, 3)
    assert (await account(stand))["db"] == 50
    await adds_up(stand)


# --- correct


async def swept(stand: Stand, hold: int, metered: int) -> SessionRef:
    """A session of the test account that was swept at what it had metered."""
    ref = await stand.hold("s1", hold)
    await stand.ledger.progress(ref, 1, metered, 0)
    await stand.tick(LEASE_MS)
    assert (await stand.run("sweep"))[0] == b"SETTLED"
    return ref


@scenario
async def a_swept_session_is_corrected_upward_once(stand: Stand) -> None:
    await stand.grant("g", 100)
    await swept(stand, 60, 20)
    await stand.tick(5)
    assert await stand.run("correct", charge="50") == [b"CORRECTED", b"30", b"0", b"50", b"3"]
    assert await session(stand, "s1", "c", "ab") == ["50", "0"]
    assert (await account(stand))["tc"] == 50
    assert (await grant_of(stand, "g"))["c"] == 50
    fields = await last_entry(stand)
    assert (fields["t"], fields["s"], fields["c"], fields["sl"], fields["d"]) == ("correct", "s1", "30", "g=30", "0")
    assert await saved_clock(stand) == WALL + LEASE_MS + 5
    await adds_up(stand)
    await unchanged(stand, "correct", [b"EXISTS", b"30", b"0", b"50", b"3"], charge="90")


@scenario
async def a_correction_goes_beyond_the_grants_like_a_settlement(stand: Stand) -> None:
    await credit_line(stand, 10)
    await stand.grant("g", 30)
    await swept(stand, 20, 20)
    assert await stand.run("correct", charge="100") == [b"CORRECTED", b"20", b"60", b"0", b"4"]
    figures = await account(stand)
    assert (figures["db"], figures["tc"], figures["av"]) == (10, 40, 0)
    assert await session(stand, "s1", "c", "ab") == ["40", "60"]
    assert (await last_entry(stand))["d"] == "10"
    assert (await stand.ledger.snapshot(stand.account)).burn_order == ()
    await adds_up(stand)


@scenario
async def a_correction_is_for_the_owner_of_a_swept_session_within_an_hour(stand: Stand) -> None:
    await stand.grant("g", 100)
    await unchanged(stand, "correct", [b"UNKNOWN"])
    ref = await stand.hold("s2", 10)
    await unchanged(stand, "correct", [b"OPEN"], sid="s2")
    await stand.ledger.settle(ref, 5, "completed")
    await unchanged(stand, "correct", [b"FINAL"], sid="s2")
    await swept(stand, 60, 20)
    await unchanged(stand, "correct", [b"FENCED"], fence=str(WALL + 1))
    await unchanged(stand, "correct", [b"LOWER"], charge="20")
    await stand.tick(HOUR_MS + 1)
    await unchanged(stand, "correct", [b"LATE"])
    await stand.tick(-1)
    assert (await stand.run("correct"))[0] == b"CORRECTED"


# --- reassert and freeze


async def reassert(stand: Stand, sid: str = "s1", **changes: Word) -> Any:
    """Make a hold anew, as its owner would: 60 micros, begun at WALL, checkpoint 3 at 7 micros."""
    words: dict[str, Word | list[Word]] = {
        "ep": "1", "uid": "acc", "sid": sid, "kid": "key", "fence": str(WALL), "q": "3", "metered": "7", "want": "60",
        "prompt": "1", "owner": "owner", "body": "hash", "price": "price", "metadata": "{}", "lease": str(LEASE_MS),
    }  # fmt: skip
    words.update(changes)
    script = stand.scripts["reassert"]
    return await scripts.run(stand.client, script, script.place(stand.keys("reassert", sid=sid), words))


@scenario
async def a_hold_is_made_anew_after_a_loss(stand: Stand) -> None:
    await stand.grant("g", 100, expires_ms=WALL + 10)
    await stand.tick(20)
    assert await reassert(stand) == [b"HELD", b"60", b"40"]
    assert await session(stand, "s1", "st", "f", "h", "m", "q", "sl") == ["H", str(WALL), "60", "7", "3", "g=60"]
    assert await lease(stand, "s1") == WALL + 20 + LEASE_MS
    assert await saved_clock(stand) == WALL + 20
    assert await stand.hash(stand.at.limits + "key") == {"p": "1"}
    await adds_up(stand)
    before = await stand.state()
    assert await reassert(stand) == [b"EXISTS", b"60", b"40"]
    assert await stand.state() == before
    ref = SessionRef("s1", stand.account, "key", WALL)
    assert await stand.ledger.progress(ref, 4, 9, 0) == Progressed(60, 40)
    await stand.ledger.settle(ref, 9, "completed")
    assert (await reassert(stand))[0] == b"FINAL"
    await adds_up(stand)


@scenario
async def a_hold_made_anew_takes_what_is_left_and_the_line(stand: Stand) -> None:
    await credit_line(stand, 20)
    await stand.grant("g", 30)
    assert await reassert(stand) == [b"HELD", b"50", b"0"]
    assert await reassert(stand, "s2") == [b"HELD", b"0", b"0"]
    assert await session(stand, "s1", "hl", "sl") == ["20", "g=30"]
    figures = await account(stand)
    assert (figures["hd"], figures["hc"], figures["ns"]) == (50, 20, 2)
    await adds_up(stand)


@scenario
async def a_voided_session_is_not_made_anew(stand: Stand) -> None:
    await stand.grant("g", 100)
    await stand.run("void", fence="0")
    assert await reassert(stand) == [b"TOMBSTONE"]
    assert (await account(stand))["hd"] == 0


@scenario
async def a_frozen_shard_answers_nobody(stand: Stand) -> None:
    await stand.grant("g", 100)
    await unchanged(stand, "freeze", [b"EPOCH"], ep="2")
    assert await stand.run("freeze", ep="1") == [b"FROZEN", b"1", b"1"]
    await unchanged(stand, "reserve", [b"EPOCH"])
    assert await stand.run("freeze", ep="") == [b"FROZEN", b"1", b"1"]
    assert (await stand.hash(stand.at.meta))["was"] == "1"
