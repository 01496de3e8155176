"""The flusher on real stores: exactly once, honest about gaps, divergence, poison and lost state."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from metering.journal import Alarm, Flusher
from metering.journal_store import prepare
from metering.keys import SHARDS
from storage.database import FAILED, connect
from tests.support.journal_entries import append, arrived, settle_fields, sums
from tests.support.stack import Stack, eventually, uuid7


async def test_a_session_arrives_once_with_its_rollup_and_leaves_the_outbox(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    said = {"route": "r", "provider": "p", "model": "m", "source": "provider", "stream": True, "prompt": 3, "output": 4}
    ref = await stack.spend(account, want=100, charge=70, metadata=json.dumps(said).encode())
    flusher = stack.flusher()
    assert await flusher.drain() == 2
    row = await stack.pool.fetchrow("SELECT * FROM session")
    assert (row["sid"], row["account_id"], row["charged"], row["outcome"]) == (ref.session, "alice", 70, "completed")
    assert (row["route"], row["prompt_tokens"], row["cached_tokens"], row["stream"]) == ("r", 3, None, True)
    assert json.loads(row["metadata"]) == said
    rolled = await stack.pool.fetchrow("SELECT * FROM usage_rollup")
    assert (rolled["shard"], rolled["route"], rolled["sessions"], rolled["charged"]) == (account.shard, "r", 1, 70)
    confirmed = await stack.pool.fetchrow("SELECT applied_epoch, applied_n FROM grant_")
    assert tuple(confirmed) == (1, 1)
    assert await stack.outbox_length() == 0
    assert await flusher.drain() == 0
    assert stack.alarms == []


async def test_entries_that_arrive_again_with_the_same_content_add_nothing(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    await stack.spend(account, 100, 70)
    kept = await stack.redis.call("XRANGE", SHARDS[account.shard].outbox, "-", "+")
    await stack.drained()
    before = await sums(stack)
    await stack.pool.execute("UPDATE shard_cursor SET n = 0 WHERE shard = $1", account.shard)
    await stack.redis.call("DEL", SHARDS[account.shard].outbox)
    for raw, fields in kept:
        await stack.redis.call("XADD", SHARDS[account.shard].outbox, raw, *fields)
    assert await stack.drained() == 2
    assert await sums(stack) == before
    assert stack.alarms == []


async def test_an_entry_that_exists_with_other_content_stops_its_shard_and_no_other(stack: Stack) -> None:
    shards = (3, 4)
    sid = uuid7()
    for shard in shards:
        await append(stack, shard, 1, settle_fields("alice", uuid7() if shard == 4 else sid, 70))
    await stack.drained()
    before = await sums(stack)
    await stack.pool.execute("UPDATE shard_cursor SET n = 0 WHERE shard = 3")
    await stack.redis.call("DEL", SHARDS[3].outbox)
    await append(stack, 3, 1, settle_fields("alice", sid, 71))
    await append(stack, 4, 2, settle_fields("alice", uuid7(), 5))
    flusher = stack.flusher()
    await flusher.drain()
    assert [(alarm.kind, alarm.shard) for alarm in stack.alarms] == [("divergence", 3)]
    after = await sums(stack)
    assert (after["sessions"], after["charged"]) == (before["sessions"] + 1, before["charged"] + 5)
    assert (await flusher.inspect()).stopped_shards.keys() == {3}
    assert await stack.redis.call("XLEN", SHARDS[3].outbox) == 1


async def test_rows_of_one_batch_that_exist_in_part_arrive_whole_and_are_summed_once(stack: Stack) -> None:
    for n in (1, 2, 3):
        await append(stack, 3, n, settle_fields("alice", uuid7(), 10 * n))
    kept = await stack.redis.call("XRANGE", SHARDS[3].outbox, "-", "+")
    await stack.flusher(batch_max=2).round()
    await stack.pool.execute("UPDATE shard_cursor SET n = 0 WHERE shard = 3")
    await stack.redis.call("DEL", SHARDS[3].outbox)
    for raw, fields in kept:
        await stack.redis.call("XADD", SHARDS[3].outbox, raw, *fields)
    assert await stack.drained() == 3
    summed = await sums(stack)
    assert (summed["sessions"], summed["charged"], summed["rolled_sessions"], summed["rolled_charged"]) == (
        3,
        60,
        3,
        60,
    )
    assert (summed["balance"], stack.alarms) == (0, [])


async def test_a_shard_with_a_backlog_is_read_deeply_beside_quiet_ones(stack: Stack) -> None:
    for shard in range(0, 64, 2):
        await append(stack, shard, 1, settle_fields("alice", uuid7(), 1))
    for n in range(2, 301):
        await append(stack, 0, n, settle_fields("alice", uuid7(), 1))
    flusher = stack.flusher(batch_max=100)
    for _ in range(2):
        await flusher.round()
    assert await stack.pool.fetchval("SELECT n FROM shard_cursor WHERE shard = 0") >= 100
    for _ in range(2):
        await flusher.round()
    assert (
        await stack.pool.fetchval("SELECT count(*) FROM shard_cursor WHERE n = 0 AND shard % 2 = 0 AND shard < 64") == 0
    )


class Overtaken:
    """A client that tells how far shard 3 is while one more of its entries is made, and moved by another flusher."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    async def call(self, *words: str | bytes | int) -> Any:
        answer = await self._stack.redis.call(*words)
        if words[:2] == ("HMGET", SHARDS[3].meta):
            await append(self._stack, 3, int(answer[1]) + 1, settle_fields("alice", uuid7(), 1))
            await self._stack.flusher().drain()
        return answer


async def test_what_moves_while_the_journal_is_looked_at_is_no_loss(stack: Stack) -> None:
    await append(stack, 3, 1, settle_fields("alice", uuid7(), 1))
    flusher = Flusher(Overtaken(stack), stack.database_url, on_alarm=stack.alarms.append)
    await flusher.drain()
    for _ in range(2):
        assert (await flusher.inspect()).stopped_shards == {}
    assert (await sums(stack))["sessions"] == 3
    assert stack.alarms == []
    await flusher.aclose()


async def test_a_commit_is_on_disk_before_the_trim_whatever_the_database_is_set_to(stack: Stack) -> None:
    name = await stack.pool.fetchval("SELECT current_database()")
    for setting, used in (("off", "on"), ("remote_apply", "remote_apply"), ("local", "local")):
        await stack.pool.execute(f"ALTER DATABASE {name} SET synchronous_commit = '{setting}'")
        connection = await connect(stack.database_url)
        await prepare(connection)
        assert await connection.fetchval("SHOW synchronous_commit") == used
        await connection.close()


async def test_a_second_terminal_entry_of_a_session_is_divergence(stack: Stack) -> None:
    sid = uuid7()
    await append(stack, 3, 1, settle_fields("alice", sid, 70))
    await append(stack, 3, 2, settle_fields("alice", sid, 70))
    await stack.flusher(batch_max=1).drain()
    assert [alarm.kind for alarm in stack.alarms] == ["divergence"]
    assert (await sums(stack))["sessions"] == 1


async def test_a_gap_stops_its_shard_after_what_precedes_it_and_no_other(stack: Stack) -> None:
    for n in (1, 2, 4, 5):
        await append(stack, 3, n, settle_fields("alice", uuid7(), 1))
        await append(stack, 9, (n + 1) // 2 * 2 if n == 99 else n if n < 3 else n - 1, settle_fields("bob", uuid7(), 1))
    flusher = stack.flusher()
    assert await flusher.drain() == 2 + 4
    assert stack.alarms == [Alarm("gap", 3, "expected entry 1-3, found 1-4")]
    assert await stack.pool.fetchval("SELECT n FROM shard_cursor WHERE shard = 3") == 2
    assert await stack.redis.call("XLEN", SHARDS[3].outbox) == 2
    await append(stack, 9, 5, settle_fields("bob", uuid7(), 1))
    assert await flusher.drain() == 1


async def test_poison_goes_to_the_dead_table_whole_and_the_shard_goes_on(stack: Stack) -> None:
    await append(stack, 3, 1, settle_fields("alice", uuid7(), 1))
    await append(stack, 3, 2, ["t", "settle", "c", "many", "mt", "\x00"])
    await append(stack, 3, 3, settle_fields("alice", uuid7(), 1))
    flusher = stack.flusher()
    assert await flusher.drain() == 3
    dead = await stack.pool.fetchrow("SELECT shard, ep, n, payload, reason FROM outbox_dead")
    assert (dead["shard"], dead["ep"], dead["n"]) == (3, 1, 2)
    assert json.loads(dead["payload"])["fields"][:4] == ["t", "settle", "c", "many"]
    assert "no id" in dead["reason"]
    assert (await sums(stack))["sessions"] == 2
    assert [(alarm.kind, alarm.shard) for alarm in stack.alarms] == [("poison", 3)]
    status = await flusher.inspect()
    assert (status.dead, status.entries_behind, status.stopped_shards) == (1, 0, {})
    assert await stack.outbox_length() == 0


async def test_an_entry_that_only_postgres_refuses_is_isolated_and_buried(stack: Stack) -> None:
    await stack.pool.execute("ALTER TABLE session ADD CONSTRAINT no_666 CHECK (charged <> 666)")
    for n in range(1, 31):
        await append(stack, 3, n, settle_fields("alice", uuid7(), 666 if n == 17 else 1))
        await append(stack, 4, n, settle_fields("bob", uuid7(), 1))
    await stack.drained()
    assert [tuple(row) for row in await stack.pool.fetch("SELECT shard, n FROM outbox_dead")] == [(3, 17)]
    assert (await sums(stack))["sessions"] == 59
    assert [row["n"] for row in await stack.pool.fetch("SELECT n FROM shard_cursor WHERE shard IN (3, 4)")] == [30, 30]


async def test_sessions_of_any_month_find_a_partition(stack: Stack) -> None:
    for n, moment in enumerate((1_577_836_800_000, 1_795_000_000_000, 4_102_444_800_000), start=1):
        await append(stack, 3, n, settle_fields("alice", uuid7(moment), 1))
    await stack.drained()
    months = [str(row["month"]) for row in await stack.pool.fetch("SELECT month FROM session ORDER BY month")]
    assert months == ["2020-01-01", "2026-11-01", "2100-01-01"]


async def test_sessions_on_both_sides_of_a_month_s_end_lie_in_their_own_months(stack: Stack) -> None:
    turn = 1_796_083_200_000  # 2026-12-01
    moments = (turn - 1, turn, turn - 2, turn + 1)
    for n, moment in enumerate(moments, start=1):
        await append(stack, 3, n, settle_fields("alice", uuid7(moment), n))
    await stack.drained()
    rows = await stack.pool.fetch("SELECT tableoid::regclass::text AS place, charged FROM session ORDER BY charged")
    assert [row["place"] for row in rows] == ["session_p2026_11", "session_p2026_12"] * 2


async def test_a_month_that_was_put_elsewhere_gets_a_table_of_its_own_again(stack: Stack) -> None:
    moment = 1_577_836_800_000
    await append(stack, 3, 1, settle_fields("alice", uuid7(moment), 1))
    flusher = stack.flusher()
    await flusher.drain()
    for statement in (
        "ALTER TABLE session DETACH PARTITION session_p2020_01",
        "CREATE SCHEMA archive",
        "ALTER TABLE session_p2020_01 SET SCHEMA archive",
    ):
        await stack.pool.execute(statement)
    await append(stack, 3, 2, settle_fields("alice", uuid7(moment + 1), 1))
    assert await flusher.drain() == 1
    assert (await stack.pool.fetchval("SELECT count(*) FROM session"), stack.alarms) == (1, [])


async def test_a_partition_that_was_removed_is_made_again(stack: Stack) -> None:
    flusher = stack.flusher()
    await append(stack, 3, 1, settle_fields("alice", uuid7(1_577_836_800_000), 1))
    await flusher.drain()
    await stack.pool.execute("DROP TABLE session_p2020_01")
    await append(stack, 3, 2, settle_fields("alice", uuid7(1_577_836_800_001), 1))
    await flusher.drain()
    assert (await stack.pool.fetchval("SELECT count(*) FROM session"), stack.alarms) == (1, [])


async def test_lost_redis_state_stops_the_shard_instead_of_skipping_entries(stack: Stack) -> None:
    for shard in (3, 4, 5):
        for n in (1, 2):
            await append(stack, shard, n, settle_fields("alice", uuid7(), 1))
    flusher = stack.flusher()
    await flusher.drain()
    await stack.redis.call("HSET", SHARDS[3].meta, "n", 1)
    await stack.redis.call("DEL", SHARDS[4].meta)
    await stack.redis.call("HSET", SHARDS[5].meta, "ep", 2)
    status = await flusher.inspect()
    assert {shard: why.split(":")[0] for shard, why in status.stopped_shards.items()} == {
        3: "regress", 4: "missing", 5: "epoch",
    }  # fmt: skip


async def test_lag_is_counted_in_entries_and_age(stack: Stack) -> None:
    flusher = stack.flusher()
    assert (await flusher.inspect()).entries_behind == 0
    account = await stack.account("alice")
    await stack.grant(account, "g1", 1_000)
    await stack.spend(account, 100, 70)
    began = time.monotonic()
    await eventually(lambda: older(began, 0.05))
    status = await flusher.inspect()
    assert status.entries_behind == 2
    assert status.oldest_age_ms >= 50
    await flusher.drain()
    assert await flusher.inspect() == type(status)()


async def older(since: float, seconds: float) -> bool:
    return time.monotonic() - since > seconds


async def test_two_flushers_at_once_deliver_everything_once(stack: Stack) -> None:
    account = await stack.account("alice")
    await stack.grant(account, "g1", 10**9)
    tasks = [asyncio.create_task(stack.flusher(batch_max=16).run()) for _ in range(2)]
    await asyncio.gather(*(stack.spend(account, 10, 7) for _ in range(150)))
    await eventually(lambda: arrived(stack, 151))
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert await sums(stack) == {
        "entries": 151, "sessions": 150, "balance": 0, "charged": 1050, "earned": 1050, "consumed": 1050,
        "rolled_charged": 1050, "rolled_sessions": 150,
    }  # fmt: skip
    assert stack.alarms == []


async def test_a_flusher_that_another_one_overtook_catches_up_without_an_alarm(stack: Stack) -> None:
    slow, fast = stack.flusher(), stack.flusher()
    await slow.drain()
    await append(stack, 3, 1, settle_fields("alice", uuid7(), 1))
    await fast.drain()
    await append(stack, 3, 2, settle_fields("alice", uuid7(), 1))
    assert await slow.drain() == 1
    assert await fast.drain() == 0
    assert stack.alarms == []
    assert await stack.pool.fetchval("SELECT n FROM shard_cursor WHERE shard = 3") == 2


FAIL_AT_COMMIT = (
    "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$",
    "CREATE CONSTRAINT TRIGGER fails AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED FOR EACH ROW "
    "EXECUTE FUNCTION fail()",
)


async def test_a_commit_that_fails_moves_nothing_and_leaves_the_outbox_whole(stack: Stack) -> None:
    for statement in FAIL_AT_COMMIT:
        await stack.pool.execute(statement)
    await append(stack, 3, 1, settle_fields("alice", uuid7(), 1))
    flusher = stack.flusher()
    for _ in range(2):
        with pytest.raises(FAILED, match="no space left"):
            await flusher.round()
        assert (await stack.outbox_length(), (await sums(stack))["entries"]) == (1, 0)
    await stack.pool.execute("DROP TRIGGER fails ON entry")
    assert await flusher.drain() == 1
    assert (await stack.outbox_length(), (await sums(stack))["entries"]) == (0, 1)
    assert stack.alarms == []
