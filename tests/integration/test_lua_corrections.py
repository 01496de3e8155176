"""The one correction of a swept session: upward only, once, by its owner, within the hour, paid as any charge is."""

from __future__ import annotations

import msgspec
import pytest

from metering.ledger import Corrected, Gone, NotCorrected, Past, PolicyChange, SessionRef
from tests.support.valkey import Stand

HOUR_MS = 3_600_000


async def swept(stand: Stand, metered: int = 20, credit: int = 100) -> SessionRef:
    """A session of an account with `credit`, swept at `metered`."""
    await stand.grant("g", credit)
    ref = await stand.hold("s1", 50, 1)
    await stand.ledger.progress(ref, 1, metered, 0)
    await stand.tick(15_000)
    (one,) = await stand.ledger.sweep_due(stand.at.number, 5)
    assert one.charged + one.absorbed == metered
    return ref


async def test_the_difference_is_charged_from_available_grants_and_journalled(stand: Stand) -> None:
    ref = await swept(stand)
    await stand.tick(5)
    assert await stand.ledger.correct(ref, 35, b'{"at":"end"}') == Corrected(15, 0, 65, 3)
    assert (await stand.entries())[-1] == (
        "1-3",
        {
            "t": "correct", "u": "acc", "ts": str(stand.now), "s": "s1", "k": "key", "c": "15", "ab": "0", "d": "0",
            "sl": "g=15", "mt": '{"at":"end"}',
        },
    )  # fmt: skip
    seen = await stand.ledger.snapshot(stand.account)
    assert (seen.balance.available, seen.balance.charged, seen.balance.held) == (65, 35, 0)
    assert (seen.grants["g"].available, seen.grants["g"].consumed) == (65, 35)
    assert await stand.ledger.past(stand.account, "s1") == Past("swept", 35)


async def test_a_repeat_answers_the_first_answer_whatever_it_asks_for(stand: Stand) -> None:
    ref = await swept(stand)
    await stand.ledger.correct(ref, 35, b"")
    await stand.tick(HOUR_MS + 1)
    before = await stand.state()
    assert await stand.ledger.correct(ref, 35, b"") == Corrected(15, 0, 65, 3, repeated=True)
    assert await stand.ledger.correct(ref, 90, b"") == Corrected(15, 0, 65, 3, repeated=True)
    assert await stand.state() == before
    assert await stand.ledger.settle(ref, 35, "completed") == Gone("final", 35)


@pytest.mark.parametrize("charge", [0, 19, 20])
async def test_a_correction_never_gives_back(stand: Stand, charge: int) -> None:
    ref = await swept(stand)
    before = await stand.state()
    assert await stand.ledger.correct(ref, charge, b"") == NotCorrected("lower")
    assert await stand.state() == before


@pytest.mark.parametrize(("offset", "in_time"), [(-1, True), (0, True), (1, False)])
async def test_a_correction_comes_within_the_hour_or_not_at_all(stand: Stand, offset: int, in_time: bool) -> None:
    ref = await swept(stand)
    await stand.tick(HOUR_MS + offset)
    before = await stand.state()
    answer = await stand.ledger.correct(ref, 35, b"")
    assert answer == (Corrected(15, 0, 65, 3) if in_time else NotCorrected("late"))
    assert (await stand.state() == before) != in_time


async def test_only_the_owner_by_its_fence_corrects(stand: Stand) -> None:
    ref = await swept(stand)
    before = await stand.state()
    assert await stand.ledger.correct(msgspec.structs.replace(ref, fence=0), 35, b"") == NotCorrected("fenced")
    assert await stand.ledger.correct(msgspec.structs.replace(ref, session="s2"), 35, b"") == NotCorrected("unknown")
    assert await stand.state() == before


async def test_a_session_that_was_not_swept_is_not_corrected(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 50)
    assert await stand.ledger.correct(ref, 35, b"") == NotCorrected("open")
    await stand.ledger.settle(ref, 10, "completed")
    before = await stand.state()
    assert await stand.ledger.correct(ref, 35, b"") == NotCorrected("ended")
    void = SessionRef("s2", stand.account, "key", 0)
    await stand.ledger.void(void)
    assert await stand.ledger.correct(void, 35, b"") == NotCorrected("unknown")
    assert (await stand.state()).items() >= before.items()


@pytest.mark.parametrize(
    ("charge", "charged", "debt", "absorbed"), [(100, 80, 0, 0), (130, 110, 30, 0), (160, 120, 40, 20)]
)
async def test_grants_pay_then_the_line_then_the_house(
    stand: Stand, charge: int, charged: int, debt: int, absorbed: int
) -> None:
    await stand.ledger.set_policy(PolicyChange(stand.account, "grace", 40, 1))
    ref = await swept(stand)
    answer = await stand.ledger.correct(ref, charge, b"")
    assert answer == Corrected(charged, absorbed, 0, 4)
    balance = (await stand.ledger.snapshot(stand.account)).balance
    assert (balance.available, balance.debt, balance.charged, balance.line) == (0, debt, 20 + charged, 0)
    assert (await stand.entries())[-1][1]["d"] == str(debt)


async def test_under_cutoff_the_house_pays_what_grants_do_not_cover(stand: Stand) -> None:
    ref = await swept(stand)
    assert await stand.ledger.correct(ref, 150, b"") == Corrected(80, 50, 0, 3)
    balance = await stand.ledger.balance(stand.account)
    assert (balance.available, balance.debt, balance.charged) == (0, 0, 100)


async def test_what_the_house_paid_at_the_sweep_is_not_asked_for_again(stand: Stand) -> None:
    ref = await swept(stand, metered=50, credit=30)
    await stand.grant("more", 100)
    assert await stand.ledger.correct(ref, 50, b"") == NotCorrected("lower")
    assert await stand.ledger.correct(ref, 60, b"") == Corrected(10, 0, 90, 4)


async def test_a_grant_that_a_correction_drains_leaves_the_burn_order(stand: Stand) -> None:
    ref = await swept(stand)
    await stand.grant("later", 100, priority=60)
    await stand.ledger.correct(ref, 130, b"")
    seen = await stand.ledger.snapshot(stand.account)
    assert seen.burn_order == ("later",)
    assert (await stand.entries())[-1][1]["sl"] == "g=80,later=30"


async def test_a_corrected_session_still_ends_a_day_after_its_sweep(stand: Stand) -> None:
    ref = await swept(stand)
    before = await stand.client.call("PEXPIRETIME", stand.at.session + "s1")
    await stand.ledger.correct(ref, 35, b"")
    assert await stand.client.call("PEXPIRETIME", stand.at.session + "s1") == before > 0
