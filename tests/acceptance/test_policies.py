"""Accounts that may go on when their grants are used up, as clients and operators meet them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from metering import grants, policies
from metering.ledger import Balance, Policy
from tests.support.credit import prompt, refused, send
from tests.support.gateway import Gateway, Key, until
from tests.support.raw_client import DONE, ask, post

TOO_MUCH = "sim-wrong-usage:kind.big"
MODELS = (TOO_MUCH,)
GRANT = 300
LINE = 5_000


async def allowed(gateway: Gateway, policy: Policy, limit: int, credit: int = GRANT) -> Key:
    """A key of an account with that credit and policy."""
    key = await gateway.key(credit)
    async with gateway.stores() as stores:
        written = await policies.change(stores.pool, stores.ledger, key.account.id, policy, limit)
    assert written.state == "applied"
    return key


def agrees(gateway: Gateway, key: Key) -> None:
    """The audit of the account is silent."""
    done = gateway.tollgate("audit", "--account", key.account.id, "--json")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("policy", ["grace", "postpaid"])
async def test_a_stream_goes_on_past_the_grants_into_debt(gateway: Gateway, policy: Policy) -> None:
    key = await allowed(gateway, policy, LINE)
    fields = ask("[[tokens=1500]]Go on.", stream=True)
    async with post(gateway, key, fields) as call:
        await call.head()
        frames = await call.rest()
    assert frames[-1].kind == DONE
    served = await gateway.served(call.headers["x-request-id"])
    row = await gateway.session(call.headers["x-tollgate-session"])
    due = prompt(fields) + 1_500
    assert row["charged"] == due == served["prompt_tokens"] + served["completion_tokens"]
    assert (row["outcome"], row["absorbed"], row["debt"]) == ("completed", 0, due - GRANT)
    assert await gateway.idle(key) == Balance(0, 0, due - GRANT, due, 0, 0, LINE, policy)
    agrees(gateway, key)


async def test_a_whole_answer_goes_on_past_the_grants_into_debt(gateway: Gateway) -> None:
    key = await allowed(gateway, "postpaid", LINE)
    fields = ask("[[tokens=800]]Go on.", max_tokens=900)
    reply = await send(gateway, key, fields)
    assert reply.status_code == 200
    assert "x-tollgate-limited" not in reply.headers
    due = prompt(fields) + 800
    assert reply.json()["usage"]["cost"] == due / 1_000_000
    balance = await gateway.idle(key)
    assert (balance.available, balance.debt, balance.charged) == (0, due - GRANT, due)
    agrees(gateway, key)


@pytest.mark.parametrize("policy", ["grace", "postpaid"])
async def test_the_limit_cuts_a_stream_and_then_refuses(gateway: Gateway, policy: Policy) -> None:
    key = await allowed(gateway, policy, 400)
    fields = ask("[[tokens=1500]]Go on.", stream=True)
    async with post(gateway, key, fields) as call:
        await call.head()
        frames = await call.rest()
    assert frames[-2].data["error"]["code"] == "insufficient_quota"
    row = await gateway.session(call.headers["x-tollgate-session"])
    balance = await gateway.idle(key)
    assert (row["outcome"], row["absorbed"]) == ("cut", 0)
    assert row["charged"] == balance.charged == GRANT + balance.debt
    assert 390 <= balance.debt <= 400
    refused(await send(gateway, key, ask("long " * 100, stream=True)), "balance")
    agrees(gateway, key)


@pytest.mark.parametrize("limit", [10, 1_000_000])
@pytest.mark.parametrize("streaming", [True, False])
async def test_a_report_above_the_hold_takes_credit_then_the_line_then_the_house(
    gateway: Gateway, streaming: bool, limit: int
) -> None:
    key = await allowed(gateway, "grace", limit)
    async with post(gateway, key, ask("[[tokens=50]]Hi.", model=TOO_MUCH, stream=streaming)) as call:
        await call.head()
        assert call.status == 200
        await (call.rest() if streaming else call.body())
    served = await gateway.served(call.headers["x-request-id"])
    row = await gateway.session(call.headers["x-tollgate-session"])
    reported = served["usage_sent"]["prompt_tokens"] + served["usage_sent"]["completion_tokens"]
    assert reported > GRANT + 10
    assert (row["charged"], row["charged"] + row["absorbed"]) == (min(reported, GRANT + limit), reported)
    assert (await gateway.idle(key)).debt == row["debt"] == row["charged"] - GRANT
    agrees(gateway, key)


async def test_a_grant_repays_debt_before_anything_is_spent(gateway: Gateway) -> None:
    key = await allowed(gateway, "grace", 400, credit=0)
    reply = await send(gateway, key, ask("[[tokens=100]]Go on.", max_tokens=100))
    assert reply.status_code == 200
    debt = (await gateway.idle(key)).debt
    async with gateway.stores() as stores:
        new = grants.NewGrant(id=f"more_{key.account.id}", account=key.account.id, amount=debt + 7)
        assert (await grants.issue(stores.pool, stores.ledger, new)).available == 7
    assert (await gateway.idle(key)).debt == 0
    agrees(gateway, key)


async def test_an_operator_sets_and_sees_the_policy(gateway: Gateway) -> None:
    key = await gateway.key(0)

    def said(*arguments: str) -> dict[str, Any]:
        done = gateway.tollgate("accounts", *arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    assert said("policy", key.account.id, "postpaid", "--limit", "0.0005") == {
        "account_id": key.account.id,
        "policy": "postpaid",
        "limit": "0.0005",
        "limit_micros": 500,
        "revision": 1,
        "state": "applied",
        "reason": "",
    }
    assert (await send(gateway, key, ask(max_tokens=20))).status_code == 200
    shown = said("show", key.account.id)
    assert (shown["policy"], shown["credit_limit"], shown["credit_limit_micros"]) == ("postpaid", "0.0005", 500)
    assert shown["balance"]["debt_micros"] == (await gateway.idle(key)).debt > 0
    assert said("policy", key.account.id, "cutoff")["limit_micros"] == 0
    refused(await send(gateway, key, ask(max_tokens=20)), "balance")
    wrong = gateway.tollgate("accounts", "policy", key.account.id, "cutoff", "--limit", "5")
    assert (wrong.returncode, wrong.stderr) == (1, "tollgate: limit: under cutoff there is none.\n")


async def test_the_ledger_process_applies_a_policy_that_did_not_reach_redis(gateway: Gateway) -> None:
    key = await gateway.key(0)
    async with gateway.stores() as stores:
        await stores.pool.execute(
            "UPDATE account SET policy = 'grace', credit_limit = 500, policy_revision = 1 WHERE id = $1", key.account.id
        )

        async def in_force() -> bool:
            balance = await stores.ledger.balance(key.account)
            return (balance.policy, balance.limit) == ("grace", 500)

        await until(in_force)
        query = "SELECT policy_applied FROM account WHERE id = $1"
        await until(lambda: stores.pool.fetchval(query, key.account.id))
    assert (await send(gateway, key, ask(max_tokens=20))).status_code == 200
