"""What tests of credit ask and expect: calls with a JSON answer, refusals to the last field, what is held right now."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx2

from loadtests.simulated_provider.chat import prompt_tokens
from metering.ledger import Balance
from proxy.ids import session_id
from tests.support.gateway import Gateway, Key, Stores, until
from tests.support.provider_log import provider_log
from tests.support.raw_client import ask, post

GRANTED = 1_000_000


def prompt(fields: dict[str, Any]) -> int:
    """Tokens of a request's prompt, as the provider counts them."""
    return prompt_tokens(fields["messages"])


async def send(gateway: Gateway, key: Key, fields: dict[str, Any] | bytes) -> httpx2.Response:
    """A call with a JSON answer."""
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    headers = {"authorization": f"Bearer {key.text}", "content-type": "application/json"}
    async with httpx2.AsyncClient(verify=False, timeout=20) as client:
        return await client.post(f"{gateway.url}/v1/chat/completions", content=body, headers=headers)


async def upstream(gateway: Gateway, path: str) -> httpx2.Response:
    async with httpx2.AsyncClient(verify=False) as client:
        return await client.get(f"{gateway.provider}{path}")


def refused(reply: httpx2.Response, limit: str) -> None:
    """A 402 as the contract has it, to the last field."""
    error = reply.json()["error"]
    assert reply.status_code == 402
    assert set(reply.json()) == {"error"}
    assert error.pop("message")
    assert error == {
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
        "metadata": {"limit": limit},
    }
    assert reply.headers["x-should-retry"] == ("false" if limit == "balance" else "true")
    assert reply.headers.get("retry-after") == (None if limit == "balance" else "1")
    assert len(reply.headers["x-request-id"]) == 36


def limited(reply: httpx2.Response, limit: str) -> int:
    """A 429 of one of the key's own limits; the seconds it says to wait."""
    assert reply.status_code == 429
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"
    assert reply.json()["error"]["metadata"] == {"limit": limit}
    assert int(reply.headers["retry-after-ms"]) > 0
    return int(reply.headers["retry-after"])


async def never_sent(gateway: Gateway, reply: httpx2.Response) -> bool:
    """Whether the provider's log knows nothing of the request."""
    entries = (await upstream(gateway, "/__log")).json()
    return all(entry["request_id"] != reply.headers["x-request-id"] for entry in entries)


async def held(stores: Stores, key: Key) -> Balance:
    """The balance once a session holds something."""

    async def holding() -> Balance | None:
        balance = await stores.ledger.balance(key.account)
        return balance if balance.held else None

    balance: Balance = await until(holding, every=0.005)
    return balance


def unique(steer: str = "", **fields: Any) -> dict[str, Any]:
    """A request whose body passes unchanged and is like no other: the provider's log knows it by its hash."""
    return ask(f"{steer}Answer {session_id()}.", stream=True, stream_options={"include_usage": True}, **fields)


async def logged(
    gateway: Gateway, fields: dict[str, Any], *, over: bool = False, answered: bool = False, at: str = ""
) -> Any:
    """The provider's log entry of a request, by its body; once it has answered, or once it is over.

    `at` is the address of another simulated provider than the gateway's own.
    """
    digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    async with httpx2.AsyncClient(verify=False) as client:

        async def find() -> Any:
            for entry in await provider_log(at or gateway.provider).entries(client):
                if entry["body_sha256"] == digest and not (over and entry["running"]):
                    return entry if entry["status"] or not answered else None
            return None

        return await until(find, every=0.005)


async def settled_once(gateway: Gateway, key: Key) -> dict[str, Any]:
    """The one session's row: one terminal entry in the journal, nothing held, the slot free, the balance right."""
    balance = await gateway.idle(key)
    (row,) = await gateway.sessions(key, 1)
    row["metadata"] = json.loads(row["metadata"])
    assert row["charged"] == GRANTED - balance.available
    assert row["absorbed"] == 0
    async with gateway.stores() as stores:
        assert await stores.pool.fetchval("SELECT count(*) FROM entry WHERE sid = $1", row["sid"]) == 1
    async with post(gateway, key, ask(max_tokens=1)) as call:
        await call.head()
        assert call.status == 200, "the key's only slot is still taken"
        await call.body()
    return row
