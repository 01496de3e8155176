"""The client's idempotency key in reserve: one session has it, only a void one loses it, and a refusal leaves none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from metering.ledger import AccountRef, Held, HoldRequest, KeyLimits, LedgerUnavailable, Past, Refused, Repeated
from tests.support.valkey import SHARD, Stand

DAY_MS = 86_400_000
HASH = "a" * 64


@pytest.fixture
async def stand(stand: Stand) -> Stand:
    """With a grant of 100."""
    await stand.grant("g", 100)
    return stand


def keyed(stand: Stand, sid: str, want: int = 10, **changes: Any) -> HoldRequest:
    return stand.request(sid, want, idempotency=HASH, **changes)


async def stored(stand: Stand, uid: str = "acc") -> bytes | None:
    found: bytes | None = await stand.client.call("GET", f"{stand.at.idempotency}{uid}:{HASH}")
    return found


async def keys_of(stand: Stand) -> list[bytes]:
    found: list[bytes] = await stand.client.call("KEYS", "i:*")
    return found


async def test_the_first_use_is_remembered_for_a_day_with_its_session_and_body(stand: Stand) -> None:
    assert isinstance(await stand.ledger.reserve(keyed(stand, "s1")), Held)
    assert await stored(stand) == b"s1 hash"
    assert DAY_MS - 60_000 < await stand.client.call("PTTL", f"{stand.at.idempotency}acc:{HASH}") <= DAY_MS


async def test_a_reserve_without_a_key_leaves_none(stand: Stand) -> None:
    await stand.hold("s1", 10)
    await stand.hold("s2", 10)
    assert await keys_of(stand) == []


@pytest.mark.parametrize(("body", "same"), [("hash", True), ("other", False)])
async def test_a_second_session_learns_who_has_the_key_and_changes_nothing(stand: Stand, body: str, same: bool) -> None:
    await stand.ledger.reserve(keyed(stand, "s1"))
    before = await stand.state()
    assert await stand.ledger.reserve(keyed(stand, "s2", body_hash=body)) == Repeated("s1", same)
    assert await stand.state() == before


async def test_a_lost_answer_is_asked_for_again_by_the_same_session(stand: Stand) -> None:
    first = await stand.ledger.reserve(keyed(stand, "s1"))
    again = await stand.ledger.reserve(keyed(stand, "s1"))
    assert isinstance(first, Held)
    assert again == Held(first.held, first.available, first.fence, first.lease_ms, repeated=True)


async def test_another_account_uses_an_equal_key_for_itself(stand: Stand) -> None:
    await stand.grant("g2", 100, uid="two")
    await stand.ledger.reserve(keyed(stand, "s1"))
    other = keyed(stand, "s2", account=AccountRef("two", SHARD), body_hash="other")
    assert isinstance(await stand.ledger.reserve(other), Held)
    assert (await stored(stand), await stored(stand, "two")) == (b"s1 hash", b"s2 other")


@pytest.mark.parametrize("key", ["key", "key2"])
async def test_all_api_keys_of_an_account_share_its_idempotency_keys(stand: Stand, key: str) -> None:
    await stand.ledger.reserve(keyed(stand, "s1"))
    assert await stand.ledger.reserve(keyed(stand, "s2", key=key)) == Repeated("s1", True)


@pytest.mark.parametrize(
    ("want", "limits"), [(101, KeyLimits()), (10, KeyLimits(requests_per_minute=0)), (10, KeyLimits(None, 0))]
)
async def test_a_refusal_leaves_no_key_so_the_same_one_may_try_again(
    stand: Stand, want: int, limits: KeyLimits
) -> None:
    assert isinstance(await stand.ledger.reserve(keyed(stand, "s1", want, limits=limits)), Refused)
    assert await keys_of(stand) == []
    assert isinstance(await stand.ledger.reserve(keyed(stand, "s2")), Held)


@pytest.mark.parametrize("trouble", ["no credit", "debt", "blocked", "rate"])
async def test_a_repeat_is_told_so_before_anything_that_would_refuse_a_new_session(stand: Stand, trouble: str) -> None:
    await stand.ledger.reserve(keyed(stand, "s1", 100))
    if trouble == "debt":
        await stand.client.call("HSET", stand.at.account + "acc", "db", "1")
    elif trouble == "blocked":
        await stand.client.call("HSET", stand.at.account + "acc", "blk", "1")
    limits = KeyLimits(requests_per_minute=0) if trouble == "rate" else KeyLimits()
    assert await stand.ledger.reserve(keyed(stand, "s2", limits=limits)) == Repeated("s1", True)


async def test_who_names_the_void_session_takes_its_key_over_once(stand: Stand) -> None:
    await stand.ledger.void(await stand.hold("s1", 10, idempotency=HASH))
    assert await stand.ledger.reserve(keyed(stand, "s2")) == Repeated("s1", True)
    assert isinstance(await stand.ledger.reserve(keyed(stand, "s2", past="s1")), Held)
    assert await stored(stand) == b"s2 hash"
    before = await stand.state()
    assert await stand.ledger.reserve(keyed(stand, "s3", past="s1")) == Repeated("s2", True)
    assert await stand.state() == before


async def test_naming_a_past_session_does_not_take_over_with_another_body_or_without_credit(stand: Stand) -> None:
    await stand.ledger.void(await stand.hold("s1", 10, idempotency=HASH))
    before = await stand.state()
    assert await stand.ledger.reserve(keyed(stand, "s2", body_hash="other", past="s1")) == Repeated("s1", False)
    assert await stand.ledger.reserve(keyed(stand, "s2", 101, past="s1")) == Refused("balance", 100, 0)
    assert await stand.state() == before


async def test_of_many_at_once_one_is_admitted_both_at_first_and_at_the_take_over(stand: Stand) -> None:
    requests = [keyed(stand, f"s{number}", 1) for number in range(30)]
    answers = await asyncio.gather(*(stand.ledger.reserve(each) for each in requests))
    assert [answer for answer in answers if isinstance(answer, Held)] == answers[:1]
    assert set(answers[1:]) == {Repeated("s0", True)}
    await stand.run("void", sid="s0")
    takers = [keyed(stand, f"t{number}", 1, past="s0") for number in range(30)]
    answers = await asyncio.gather(*(stand.ledger.reserve(each) for each in takers))
    assert sum(isinstance(answer, Held) for answer in answers) == 1
    assert (await stand.ledger.balance(stand.account)).held == 1


async def test_the_past_of_a_session_is_running_or_its_outcome_and_charge(stand: Stand) -> None:
    running, paid, void = [await stand.hold(sid, 20) for sid in ("s1", "s2", "s3")]
    swept = await stand.hold("s4", 20)
    await stand.ledger.progress(swept, 1, 7, 20)
    await stand.ledger.settle(paid, 12, "completed")
    await stand.ledger.void(void)
    assert await stand.ledger.past(stand.account, running.session) == Past(None)
    assert await stand.ledger.past(stand.account, "s2") == Past("completed", 12)
    assert await stand.ledger.past(stand.account, "s3") == Past("void", 0)
    await stand.tick(15_000)
    await stand.ledger.sweep_due(SHARD, 5)
    assert await stand.ledger.past(stand.account, "s4") == Past("swept", 7)


async def test_of_a_session_that_never_was_or_is_somebody_elses_no_past_is_told(stand: Stand) -> None:
    await stand.hold("s1", 10)
    await stand.run("void", sid="never", fence="0")
    assert await stand.ledger.past(AccountRef("two", SHARD), "s1") is None
    assert await stand.ledger.past(stand.account, "never") is None
    assert await stand.ledger.past(stand.account, "unknown") is None


async def test_without_redis_the_past_is_unavailable(stand: Stand) -> None:
    await stand.client.aclose()
    with pytest.raises(LedgerUnavailable):
        await stand.ledger.past(stand.account, "s1")
