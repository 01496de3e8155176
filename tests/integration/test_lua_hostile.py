"""Money scripts against damaged keys, absurd arguments and a server that forgets: all of it, or nothing."""

from __future__ import annotations

import pytest

from metering.ledger import Held, LedgerError
from metering.scripts import NAMES
from storage.redis_client import RedisReplyError
from tests.support.valkey import WALL, Stand

ABSURD = ["nan", "inf", "-inf", "-1", "+1", "1e3", "0x10", " 5 ", "1.5", "", str(2**53), "9" * 10_240, "1\x00", "\x00"]
SEPARATED = ["a|b", "a=b", "a,b", "a:b", "a b", "a\x00b", "", "é", "x" * 65, "x" * 10_240, "{v007}"]
AMOUNTS = {
    "reserve": ("want", "minimum", "prompt", "lease"),
    "progress": ("q", "metered", "want", "lease"),
    "settle": ("charge",),
    "grant": ("credit", "priority", "expiry", "created"),
    "due": ("limit",),
    "expiring": ("limit",),
    "take": ("debit",),
    "policy": ("limit", "revision"),
    "correct": ("charge",),
    "reassert": ("fence", "q", "metered", "want", "prompt", "lease"),
    "init": ("ep",),
}
IDS = {
    "reserve": ("uid", "sid", "kid"),
    "progress": ("sid",),
    "settle": ("sid",),
    "void": ("sid",),
    "sweep": ("sid",),
    "grant": ("uid", "gid"),
    "audit": ("uid",),
    "expire": ("uid", "gid"),
    "revoke": ("uid", "gid"),
    "take": ("uid", "change"),
    "policy": ("uid",),
    "correct": ("sid",),
    "reassert": ("uid", "sid", "kid"),
}
WRITERS = ("reserve", "progress", "settle", "void", "sweep", "grant", "expire", "revoke", "take", "policy", "correct",
           "freeze", "reassert")  # fmt: skip
POISON_CASES = [
    (name, key)
    for name, keys in {
        "reserve": ("meta", "account", "order", "grants", "session", "leases", "limits", "idempotency"),
        "progress": ("meta", "account", "order", "grants", "session", "leases"),
        "settle": ("meta", "account", "order", "grants", "session", "leases", "limits", "outbox"),
        "void": ("meta", "account", "grants", "session", "leases", "limits", "outbox"),
        "sweep": ("meta", "account", "order", "grants", "session", "leases", "limits", "outbox"),
        "grant": ("meta", "account", "order", "grants", "expiries", "outbox"),
        "expire": ("meta", "account", "order", "grants", "expiries", "outbox"),
        "revoke": ("meta", "account", "order", "grants", "expiries", "outbox"),
        "take": ("meta", "account", "order", "grants", "outbox"),
        "policy": ("meta", "account", "outbox"),
        "correct": ("meta", "account", "order", "grants", "session", "outbox"),
        "freeze": ("meta",),
        "reassert": ("meta", "account", "order", "grants", "session", "leases", "limits"),
    }.items()
    for key in keys
]


async def prepare(stand: Stand, script: str) -> None:
    """A state in which the script, with its valid arguments, writes every key that it can write."""
    await stand.grant("g0", 500, priority=1, expires_ms=WALL + 60_000)
    await stand.grant("g9", 500, priority=2)
    if script == "expire":
        await stand.tick(60_000)
    if script in ("reserve", "grant", "expire", "revoke", "take", "policy", "freeze", "reassert"):
        return
    await stand.hold("s1", 100)
    if script == "sweep":
        await stand.run("progress", metered="1200", want="100")
        await stand.tick(15_000)
    if script == "correct":
        await stand.tick(15_000)
        await stand.run("sweep")


GENEROUS = {
    "reserve": {"rpm": "5", "parallel": "5"},
    "progress": {"want": "700"},
    "settle": {"charge": "1200"},  # more than there is: the excess path, both grants run dry
    "grant": {"expiry": str(WALL + 9)},
    "expire": {"gid": "g0"},
    "revoke": {"gid": "g0"},
    "correct": {"charge": "1200"},
}


@pytest.mark.parametrize(("script", "key"), POISON_CASES)
async def test_a_key_of_the_wrong_type_leaves_every_byte_as_it_was(stand: Stand, script: str, key: str) -> None:
    await prepare(stand, script)
    name = str(stand.keys(script)[key])
    await stand.client.call("DEL", name)
    await stand.client.call(*(("RPUSH", name, "poison") if key == "idempotency" else ("SET", name, "poison")))
    before = await stand.state()
    with pytest.raises(RedisReplyError, match="WRONGTYPE"):
        await stand.run(script, **GENEROUS.get(script, {}))
    assert await stand.state() == before


@pytest.mark.parametrize("script", WRITERS)
async def test_the_same_call_on_healthy_keys_writes_all_of_them(stand: Stand, script: str) -> None:
    """Otherwise the poison test could pass for a script that had stopped writing."""
    await prepare(stand, script)
    await stand.tick(1)
    before = await stand.state()
    reply = await stand.run(script, **GENEROUS.get(script, {}))
    assert reply[0] in (b"HELD", b"OK", b"SETTLED", b"GRANTED", b"EXPIRED", b"REVOKED", b"TAKEN", b"SET", b"CORRECTED",
                        b"FROZEN")  # fmt: skip
    after = await stand.state()
    written = {
        key for name, key in POISON_CASES if name == script
        if before.get(str(stand.keys(script)[key]).encode()) != after.get(str(stand.keys(script)[key]).encode())
    }  # fmt: skip
    read_only = {"order"} if script in ("reserve", "progress", "reassert") else set()
    assert {key for name, key in POISON_CASES if name == script} - written == read_only


@pytest.mark.parametrize("script", [name for name, key in POISON_CASES if key == "outbox"])
async def test_an_outbox_that_is_ahead_of_the_sequence_stops_the_write_whole(stand: Stand, script: str) -> None:
    await prepare(stand, script)
    await stand.client.call("XADD", stand.at.outbox, "1-99", "t", "alien")
    before = await stand.state()
    with pytest.raises(RedisReplyError, match="ID specified in XADD"):
        await stand.run(script, **GENEROUS.get(script, {}))
    assert await stand.state() == before


@pytest.mark.parametrize("damage", ["nan", "inf", "-5", "x", "", "1.5", "1e3", "0x10", " 5 ", str(2**53)])
@pytest.mark.parametrize(
    ("key", "field"),
    [("account", "av"), ("account", "hd"), ("account", "tc"), ("grants", "g0:a"), ("grants", "g0:h"), ("meta", "n")],
)
async def test_a_damaged_stored_number_stops_the_settlement_whole(
    stand: Stand, key: str, field: str, damage: str
) -> None:
    await prepare(stand, "settle")
    await stand.client.call("HSET", str(stand.keys("settle")[key]), field, damage)
    before = await stand.state()
    with pytest.raises(RedisReplyError, match="BROKEN"):
        await stand.run("settle")
    assert await stand.state() == before


@pytest.mark.parametrize("damage", ["", " ", "poison", "s1", "s1 hash more", " hash", "s1\nhash"])
async def test_a_damaged_idempotency_key_stops_the_reserve_whole(stand: Stand, damage: str) -> None:
    await prepare(stand, "reserve")
    await stand.client.call("SET", str(stand.keys("reserve")["idempotency"]), damage)
    before = await stand.state()
    with pytest.raises(RedisReplyError, match="BROKEN"):
        await stand.run("reserve")
    assert await stand.state() == before


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize(("script", "field"), [(s, f) for s, fields in AMOUNTS.items() for f in fields])
async def test_an_absurd_amount_is_refused_and_changes_nothing(
    stand: Stand, script: str, field: str, value: str
) -> None:
    await prepare(stand, script)
    before = await stand.state()
    reply = await stand.run(script, **{field: value})
    assert reply[0] == b"BOUNDS"
    assert await stand.state() == before


@pytest.mark.parametrize("value", [value for value in ABSURD if value])
@pytest.mark.parametrize("field", ["rpm", "parallel"])
async def test_an_absurd_limit_is_refused_and_changes_nothing(stand: Stand, field: str, value: str) -> None:
    await prepare(stand, "reserve")
    before = await stand.state()
    assert (await stand.run("reserve", **{field: value}))[0] == b"BOUNDS"
    assert await stand.state() == before


@pytest.mark.parametrize("value", ABSURD)
@pytest.mark.parametrize("script", ["progress", "settle", "void", "correct"])
async def test_an_absurd_fence_opens_nothing(stand: Stand, script: str, value: str) -> None:
    await prepare(stand, script)
    before = await stand.state()
    assert await stand.run(script, fence=value) == [b"FENCED"]
    assert await stand.state() == before


@pytest.mark.parametrize("value", SEPARATED)
@pytest.mark.parametrize(("script", "field"), [(s, f) for s, fields in IDS.items() for f in fields])
async def test_an_id_with_a_separator_is_refused_and_changes_nothing(
    stand: Stand, script: str, field: str, value: str
) -> None:
    await prepare(stand, script)
    before = await stand.state()
    chosen = stand.scripts[script]
    arguments = stand.args(script)
    arguments[field] = value
    reply = await stand.client.call("EVAL", chosen.text, *chosen.place(stand.keys(script), arguments))
    assert reply[0] == b"BOUNDS"
    assert await stand.state() == before


@pytest.mark.parametrize("value", [value for value in SEPARATED if value])
async def test_a_past_session_with_a_separator_is_refused_and_changes_nothing(stand: Stand, value: str) -> None:
    await prepare(stand, "reserve")
    before = await stand.state()
    assert (await stand.run("reserve", past=value))[0] == b"BOUNDS"
    assert await stand.state() == before


@pytest.mark.parametrize(
    ("script", "field"),
    [
        ("progress", "uid"),
        ("settle", "uid"),
        ("settle", "kid"),
        ("void", "uid"),
        ("void", "kid"),
        ("sweep", "kid"),
        ("correct", "uid"),
        ("correct", "kid"),
    ],
)
async def test_a_session_is_ended_only_in_the_name_of_its_account_and_key(
    stand: Stand, script: str, field: str
) -> None:
    await prepare(stand, script)
    before = await stand.state()
    assert (await stand.run(script, **{field: "other"}))[0] in (b"BOUNDS", b"UNKNOWN")
    assert await stand.state() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [("metadata", "x" * 4_097), ("owner", "a b"), ("body", "x" * 129), ("price", "é"), ("owner", "a\x00")],
)
async def test_oversize_or_unprintable_words_are_refused(stand: Stand, field: str, value: str) -> None:
    await stand.grant("g0", 500)
    before = await stand.state()
    assert (await stand.run("reserve", **{field: value}))[0] == b"BOUNDS"
    assert await stand.state() == before


@pytest.mark.parametrize("outcome", ["", "swept", "void", "done", "completed\x00"])
async def test_an_outcome_that_settle_does_not_know_is_refused(stand: Stand, outcome: str) -> None:
    await prepare(stand, "settle")
    before = await stand.state()
    assert await stand.run("settle", outcome=outcome) == [b"BOUNDS", b"outcome"]
    assert await stand.state() == before


async def test_any_bytes_up_to_4_kib_travel_as_metadata(stand: Stand) -> None:
    await stand.grant("g0", 500)
    metadata = bytes(range(256)) * 16
    ref = await stand.hold("s1", 100)
    await stand.ledger.settle(ref, 5, "completed", metadata)
    ((_, flat),) = (await stand.client.call("XRANGE", stand.at.outbox, "1-2", "+"))[:1]
    assert flat[flat.index(b"mt") + 1] == metadata


@pytest.mark.parametrize("script", NAMES)
async def test_too_few_or_too_many_words_are_refused(stand: Stand, script: str) -> None:
    await prepare(stand, script)
    before = await stand.state()
    chosen = stand.scripts[script]
    words = chosen.place(stand.keys(script), stand.args(script))
    assert isinstance(words[0], int)
    short = [words[0] - 1, *words[2:]]
    for wrong in (words[:-1], [*words, "more"], short):
        assert (await stand.client.call("EVAL", chosen.text, *wrong))[0] == b"BOUNDS"
    assert await stand.state() == before


@pytest.mark.parametrize("script", [name for name in NAMES if name not in ("init", "freeze")])
@pytest.mark.parametrize("epoch", ["missing", "other", "frozen"])
async def test_another_epoch_stops_every_script(stand: Stand, script: str, epoch: str) -> None:
    await prepare(stand, script)
    if epoch == "missing":
        await stand.client.call("HDEL", stand.at.meta, "ep")
    else:
        await stand.client.call("HSET", stand.at.meta, "ep", "2" if epoch == "other" else "-1")
    before = await stand.state()
    assert await stand.run(script) == [b"EPOCH"]
    assert await stand.state() == before


async def test_the_ledger_works_when_the_server_forgets_its_scripts_between_all_calls(stand: Stand) -> None:
    async def forget() -> None:
        await stand.client.call("SCRIPT", "FLUSH")

    await forget()
    await stand.grant("g", 100)
    await forget()
    ref = await stand.hold("s1", 50)
    await forget()
    await stand.ledger.progress(ref, 1, 1, 60)
    await forget()
    await stand.ledger.settle(ref, 30, "completed")
    await forget()
    await stand.ledger.void(ref)
    await forget()
    await stand.hold("s2", 10)
    await stand.tick(15_000)
    await forget()
    assert len(await stand.ledger.sweep_due(stand.at.number, 5)) == 1
    await forget()
    assert (await stand.ledger.snapshot(stand.account)).balance.available == 70


async def test_out_of_memory_refuses_holds_whole_and_still_settles(stand: Stand) -> None:
    await stand.grant("g", 100)
    ref = await stand.hold("s1", 50)
    await stand.client.call("CONFIG", "SET", "maxmemory", "1")
    try:
        before = await stand.state()
        with pytest.raises(LedgerError, match="OOM"):
            await stand.ledger.reserve(stand.request("s2", 10))
        assert await stand.state() == before
        await stand.ledger.settle(ref, 20, "completed")
    finally:
        await stand.client.call("CONFIG", "SET", "maxmemory", "0")
    assert isinstance(await stand.ledger.reserve(stand.request("s2", 80)), Held)
