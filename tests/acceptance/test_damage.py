"""A number in Redis is damaged while a call runs: the client has its answer, an operator is told, nothing is lost."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import pytest

from metering.keys import SHARDS
from tests.support.credit import GRANTED
from tests.support.gateway import Gateway, Key, Stores, until
from tests.support.raw_client import DONE, ask, post


async def refused_settlements(gateway: Gateway) -> int:
    async with httpx2.AsyncClient() as client:
        text = (await client.get(f"{gateway.url}/metrics")).text
    (found,) = re.findall(r"^tollgate_settle_failed_total (\S+)$", text, re.MULTILINE)
    return int(float(found))


async def open_session(stores: Stores, key: Key) -> str:
    """The account's one session, once it is held."""
    shard = SHARDS[key.account.shard]

    async def find() -> str | None:
        for member in await stores.redis.call("ZRANGE", shard.leases, "0", "-1"):
            account, _, session = member.decode().partition("|")
            if account == key.account.id:
                return str(session)
        return None

    session: str = await until(find, 10)
    return session


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_is_whole_when_its_settlement_is_refused(gateway: Gateway, key: Key, stream: bool) -> None:
    fields: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {"max_tokens": 40}
    before = await refused_settlements(gateway)
    async with gateway.stores() as stores:
        asked = ask("[[tokens=40]][[interval_ms=15]]Go on.", stream=stream, **fields)
        async with post(gateway, key, asked) as call:
            session = await open_session(stores, key)
            field = SHARDS[key.account.shard].session + session
            good = await stores.redis.call("HGET", field, "h")
            await stores.redis.call("HSET", field, "h", "damaged")
            await call.head()
            assert call.status == 200
            if stream:
                frames = await call.rest()
                assert frames[-1].kind == DONE
                assert not any("error" in frame.data for frame in frames)
                bill = frames[-2].data
                assert bill["usage"]["completion_tokens"] == 40
                assert "balance" not in bill["x_tollgate"]
            else:
                assert b'"completion_tokens":40' in (await call.body()).replace(b" ", b"")
                assert "x-tollgate-balance" not in call.headers
        assert await refused_settlements(gateway) == before + 1
        (line,) = [
            line for line in gateway.log.read_text().splitlines() if session in line and "refused a settlement" in line
        ]
        assert '"level": "error"' in line or '"level":"error"' in line
        assert (await stores.ledger.balance(key.account)).sessions == 1
        await stores.redis.call("HSET", field, "h", good)
        shard = SHARDS[key.account.shard]
        await stores.redis.call("ZADD", shard.leases, "1", f"{key.account.id}|{session}")
    balance = await gateway.idle(key)  # mended, the sweeper ends it at what it had last checkpointed
    assert balance.available == GRANTED - balance.charged
    assert (await gateway.session(session))["outcome"] == "swept"
