"""The scripts under a user who may not write, behind a replay of the append-only file, on a replica, at 64 grants."""

from __future__ import annotations

import asyncio
import re
import time
from random import Random
from typing import Any

import pytest

from metering import scripts
from metering.ledger import KeyLimits
from metering.scripts import Word
from storage.redis_client import RedisClient, RedisReplyError
from tests.integration.test_lua_hostile import ABSURD, GENEROUS, POISON_CASES, SEPARATED, WRITERS, prepare
from tests.support.lua_cost import BOUND_US, MEASURED, SHAPES, turns_of
from tests.support.lua_scenarios import adds_up
from tests.support.lua_scenarios_all import SCENARIOS, fresh
from tests.support.redis_server import RedisServer
from tests.support.replicas import connected, replicated
from tests.support.valkey import TEST_CLOCK, WALL, Stand, stand_on

WRITES = re.compile(r"call\('(XADD|HSET|HSETNX|HDEL|SET|DEL|PEXPIRE|ZADD|ZREM)'")
READERS = {
    "string": ("GET",),
    "hash": ("HGETALL",),
    "zset": ("ZRANGE", "0", "-1", "WITHSCORES"),
    "stream": ("XRANGE", "-", "+"),
}
FUZZ = 200
"""Calls of each script with random arguments; the seed is the script's name."""
OTHERS = {
    "ep": ["2", "-1"],
    "want": ["0", "1", "99999"],
    "minimum": ["0", "1", "100", "99999"],
    "metered": ["0", "5", "40", "1300"],
    "charge": ["0", "1", "1300", str(10**15), str(2**53 - 1)],
    "credit": ["1", str(2**53 - 1)],
    "debit": ["1", "99999"],
    "limit": ["0", "1", "500", "10000"],
    "q": ["0", "2", "3", "4"],
    "fence": ["0", "1"],
    "rpm": ["0", "1", "600"],
    "parallel": ["0", "1", "600"],
    "past": ["s0"],
    "outcome": ["aborted", "cut", "error", "void", "swept"],
    "policy": ["cutoff", "postpaid"],
    "revision": ["2", "3"],
    "whole": ["0"],
    "gid": ["g0", "g9"],
    "change": ["j2", "g0"],
    "expiry": [str(WALL), str(WALL + 99_999)],
}
"""What a fuzzed argument may be beside the valid and the absurd."""
UNTOUCHED = {("void", "order"), ("correct", "leases"), ("correct", "limits")}
"""Keys that these scripts share with others and do not use themselves."""
RATIO = 1.15
"""What a verb may cost with 64 grants, in costs with one. The best turns differ by less than 1.1, also with four busy
processes per core; a burn order read as one page of 64 costs an extension 1.2 to 1.3, one whose grants are all read 4.
"""
SLOWER = 1.5
"""How much slower than the machine of the published bound this one may be. `make prove-lua` prints the figures."""


def written_commands() -> list[tuple[str, str]]:
    """Each writing script with each command that writes in it."""
    loaded = scripts.load()
    return [(name, command) for name in WRITERS for command in sorted(set(WRITES.findall(loaded[name].text)))]


@pytest.mark.parametrize(("script", "command"), written_commands())
async def test_a_user_who_may_not_run_one_of_its_writes_changes_nothing(
    stand: Stand, script: str, command: str
) -> None:
    await prepare(stand, script)
    if command == "HDEL":  # admissions that no window asks for any more
        await stand.client.call("HSET", str(stand.keys(script)["limits"]), "q", "9", "lo", "0")
    await stand.tick(1)
    before = await stand.state()
    await stand.client.call("ACL", "SETUSER", "default", f"-{command}")
    try:
        with pytest.raises(RedisReplyError, match="no permissions"):
            await stand.run(script, **GENEROUS.get(script, {}))
    finally:
        await stand.client.call("ACL", "SETUSER", "default", f"+{command}")
    assert await stand.state() == before


def test_every_script_that_writes_is_tried_with_each_of_its_commands() -> None:
    assert {name for name, script in scripts.load().items() if WRITES.search(script.text)} == {*WRITERS, "init"}
    assert len(written_commands()) > 40


@pytest.mark.parametrize("command", ["HSET", "PEXPIRE"])
async def test_a_tombstone_is_written_whole_or_not_at_all(stand: Stand, command: str) -> None:
    before = await stand.state()
    await stand.client.call("ACL", "SETUSER", "default", f"-{command}")
    try:
        with pytest.raises(RedisReplyError, match="no permissions"):
            await stand.run("void", fence="0")
    finally:
        await stand.client.call("ACL", "SETUSER", "default", f"+{command}")
    assert await stand.state() == before


def other_keys() -> list[tuple[str, str]]:
    """Each script with each key of its header that test_lua_hostile.py does not poison."""
    every = [(name, key) for name, script in scripts.load().items() for key in script.keys]
    return [case for case in every if case not in POISON_CASES]


@pytest.mark.parametrize(("script", "key"), other_keys())
async def test_a_key_of_the_wrong_type_changes_no_byte_where_scripts_only_read(
    stand: Stand, script: str, key: str
) -> None:
    await prepare(stand, script)
    await stand.tick(1)
    chosen, keys = stand.scripts[script], stand.keys(script)
    value = keys[key.removesuffix("...")]
    name = value[0] if isinstance(value, list) else value
    await stand.client.call("DEL", name)
    await stand.client.call("SET", name, "poison")
    before = await stand.state()
    words = chosen.place(keys, stand.args(script, **GENEROUS.get(script, {})))
    if (script, key) in UNTOUCHED:
        await stand.client.call("EVALSHA", chosen.sha, *words)
        assert (await stand.state())[str(name).encode()] == before[str(name).encode()]
        return
    with pytest.raises(RedisReplyError, match="WRONGTYPE"):
        await stand.client.call("EVALSHA", chosen.sha, *words)
    assert await stand.state() == before


class Forgetful(RedisClient):
    """A client whose server forgets every script before each call of one."""

    def call(self, *args: Word) -> asyncio.Future[Any]:
        """As the client's, after a SCRIPT FLUSH on the same connection."""
        if args[0] == "EVALSHA":
            super().call("SCRIPT", "FLUSH").add_done_callback(lambda flushed: flushed.result())
        return super().call(*args)


async def test_every_scenario_passes_on_a_server_that_forgets_its_scripts(server: RedisServer) -> None:
    client = Forgetful(server.url, call_ms=5_000, connect_ms=2_000, pending_max=1_000)
    await client.start()
    try:
        for run in SCENARIOS.values():
            await run(await fresh(client, scripts.load(TEST_CLOCK)))
    finally:
        await client.aclose()


def fuzzed(random: Random, name: str, valid: Word) -> Word:
    """The valid word more often than not, else another or an absurd one. An id that belongs to a key is never another
    good id: callers make both from one."""
    if random.random() < 0.85:
        return valid
    return random.choice(SEPARATED if name in ("uid", "sid", "kid") else [*OTHERS.get(name, []), *ABSURD, *SEPARATED])


@pytest.mark.parametrize("script", scripts.NAMES)
async def test_random_arguments_end_in_a_named_answer_and_leave_the_books_straight(stand: Stand, script: str) -> None:
    random = Random(script)
    await prepare(stand, "sweep")
    chosen = stand.scripts[script]
    promised = {code for answer in chosen.returns for code in answer.split(" ")[0].split("|")}
    for number in range(FUZZ):
        sid = f"n{number}"
        if script not in ("reserve", "reassert"):
            await stand.hold(sid, 2, 0)
        keys = stand.keys(script, sid=sid)
        if script == "reserve":
            keys["idempotency"] = stand.at.idempotency
        words = stand.args(script, sid=sid, fence=str(stand.now))
        for name, valid in words.items():
            if not isinstance(valid, list):
                words[name] = fuzzed(random, name, valid)
        reply = await stand.client.call("EVALSHA", chosen.sha, *chosen.place(keys, words))
        assert reply[0].decode() in promised, (words, reply)
        await stand.client.call("HSET", stand.at.meta, "ep", "1")  # else the first freeze would be the last call
    await adds_up(stand)


async def contents(client: RedisClient) -> dict[bytes, tuple[str, Any, int]]:
    """All that a server holds, as values and deadlines: two servers may pack the same value in different bytes."""
    out = {}
    for name in sorted(await client.call("KEYS", "*")):
        kind = (await client.call("TYPE", name)).decode()
        command, *rest = READERS[kind]
        value = await client.call(command, name, *rest)
        if kind == "hash":
            value = dict(zip(value[::2], value[1::2], strict=True))
        out[name] = (kind, value, await client.call("PEXPIRETIME", name))
    return out


async def live(stand: Stand) -> None:
    """A history of all kinds of endings, with an expired and a drained grant, a tombstone and open holds."""
    limits = KeyLimits(requests_per_minute=6, parallel_sessions=9)
    await stand.grant("old", 300, priority=1, expires_ms=WALL + 5_000)
    await stand.grant("g", 10**14, priority=2)
    for number in range(7):
        await stand.tick(11_000 if number else 10)
        ref = await stand.hold(f"s{number}", 120, limits=limits, idempotency=f"{number}" * 64)
        await stand.ledger.progress(ref, 1, 50, 200)
        if number in (1, 2):
            await stand.ledger.settle(ref, 90 * number**3, "completed")
        elif number == 3:
            await stand.ledger.void(ref)
    await stand.ledger.void(await stand.hold("late", 1))
    assert await stand.ledger.sweep_due(stand.at.number, 10)
    await stand.run("void", sid="never", fence="0")


async def test_the_append_only_file_and_a_replica_say_what_the_server_says() -> None:
    with replicated() as pair:
        async with stand_on(pair.primary) as stand:
            await live(stand)
            deadline = time.monotonic() + 20  # WAIT counts the writes of its own connection
            while await stand.client.call("WAIT", 1, 100) != 1:
                assert time.monotonic() < deadline, "the replica does not follow"
            expected = await contents(stand.client)
            assert {kind for kind, _, _ in expected.values()} == READERS.keys()
        async with connected(pair.replica) as client:
            assert await contents(client) == expected
        pair.primary.kill()
        pair.primary.start()
        async with connected(pair.primary) as client:
            assert await contents(client) == expected


@pytest.mark.parametrize("number", ["0", "-0", "100000", "1e14", "1e15", "123456789012345", "9007199254740991"])
async def test_the_server_writes_whole_numbers_with_all_their_digits(server: RedisServer, number: str) -> None:
    """The scripts give them to commands, and answer them, as numbers."""
    text = f"local n = {number} redis.call('HSET', KEYS[1], 'f', n) return {{n, redis.call('HGET', KEYS[1], 'f')}}"
    async with connected(server) as client:
        expected = int(float(number))
        assert await client.call("EVAL", f"#!lua\n{text}", 1, "k") == [expected, str(expected).encode()]


async def test_64_grants_cost_a_call_little_more_than_one(server: RedisServer) -> None:
    """The published bound is 30 us of server time for a verb. The server counts wall time, to which a busy machine only
    adds: the best of as many turns as it takes must be within the bound, and hardly above the cost with one grant."""
    deadline = time.monotonic() + 15
    one: dict[str, float] = {}
    many: dict[str, float] = {}
    async with connected(server) as client:
        while True:
            for best, shape in ((one, SHAPES[0]), (many, MEASURED)):
                for verb, costs in (await turns_of(client, shape, 30)).items():
                    best[verb] = min(costs[0], best.get(verb, costs[0]))
            most = {verb: min(RATIO * cost, SLOWER * BOUND_US) for verb, cost in one.items()}
            slow = {verb: (one[verb], cost) for verb, cost in many.items() if cost > most[verb]}
            if not slow or time.monotonic() > deadline:
                break
    assert slow == {}
