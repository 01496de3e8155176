"""What a client is told of its charge: one rule for headers, usage and errors, and it is what Postgres will show."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from metering.ledger import AccountRef, Gone, Outcome, SessionRef, Settled
from metering.pricing import TokenUsage
from proxy.answer import bill_headers, session_members, usage_json
from proxy.live_session import LiveSession
from proxy.relay import _cut_error
from proxy.session import Ending
from proxy.settlement import Bill, Reply, charge_told

HELD = 100


def session(*, stream: bool = True, delivered: bool = False, checkpoint: int = 0) -> LiveSession:
    return LiveSession(
        ref=SessionRef("s1", AccountRef("u1", 0), "k1", 1),
        request_id="r1",
        route="route",
        stream=stream,
        held=HELD,
        hold_max=HELD,
        slice_cost=1,
        slice_low_cost=1,
        fence_ms=0,
        delivered=delivered,
        checkpoint_metered=checkpoint,
    )


def due(micros: int, outcome: Outcome = "completed") -> Bill:
    return Bill(TokenUsage(1, 0, 2, 0, 0), "counted", micros, outcome, 2, Ending.COMPLETED)


def settled(charged: int, absorbed: int = 0) -> Settled:
    return Settled(charged, absorbed, 7, 1, repeated=False)


CASES: dict[str, tuple[LiveSession, Bill, Reply, int | None]] = {
    "settled: what the ledger charged": (session(), due(60), settled(60), 60),
    "settled, in part absorbed: without that part": (session(), due(160), settled(130, 30), 130),
    "settled before, by a lost reply: the first answer": (session(), due(60), Settled(60, 0, 7, 1, repeated=True), 60),
    "voided: nothing": (session(), due(0, "void"), settled(0), 0),
    "swept for more than is due: the sweep's charge": (session(), due(20), Gone("final", 30), 30),
    "swept for what is due: the sweep's charge": (session(), due(30), Gone("final", 30), 30),
    "swept instead of a void: the sweep's charge": (session(), due(0, "void"), Gone("final", 30), 30),
    "swept for less, a stream: a correction follows, so nothing yet": (session(), due(60), Gone("final", 30), None),
    "swept for less, a whole answer that was kept back: the sweep's charge": (
        session(stream=False), due(60), Gone("final", 30), 30,
    ),
    "swept for less, a whole answer that was given: a correction follows": (
        session(stream=False, delivered=True), due(60), Gone("final", 30), None,
    ),
    "swept for less, a whole call that its client left: a correction follows": (
        session(stream=False), due(60, "aborted"), Gone("final", 30), None,
    ),
    "somebody else's: nothing": (session(), due(60), Gone("fenced"), None),
    "not known any more: nothing": (session(), due(60), Gone("unknown"), None),
    "no answer yet, inside the hold: what is due": (session(checkpoint=40), due(60), None, 60),
    "no answer yet, the whole hold: what is due": (session(), due(HELD), None, HELD),
    "no answer yet, above the hold: nothing": (session(), due(HELD + 1), None, None),
    "no answer yet, below a checkpoint, which a sweep would charge: nothing": (
        session(checkpoint=61), due(60), None, None,
    ),
    "no answer yet to a void, nothing metered: nothing is charged": (session(), due(0, "void"), None, 0),
    "no answer yet to a void, the prompt metered: nothing": (session(checkpoint=9), due(0, "void"), None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_client_is_told_what_postgres_will_show_or_nothing_everywhere_alike(case: str) -> None:
    of, bill, reply, expected = CASES[case]
    assert charge_told(of, bill, reply) == expected
    assert told(of, bill, reply) == {expected}


def told(of: LiveSession, bill: Bill, reply: Reply) -> set[int | None]:
    """The charge in each place that has one, in micros."""
    headers = dict(bill_headers(of, bill, reply))
    members = json.loads(session_members(of, bill, reply).removeprefix(b',"x_tollgate":'), parse_float=Decimal)
    usage = json.loads(usage_json(of, bill, reply), parse_float=Decimal)
    header = headers.get(b"x-tollgate-charge")
    credits = (None if header is None else Decimal(header.decode()), members.get("charge"), usage.get("cost"))
    cut = (_cut_error(of, charge_told(of, bill, reply)).metadata or {}).get("charged")
    assert cut is None or isinstance(cut, int)
    return {None if amount is None else int(amount * 1_000_000) for amount in credits} | {cut}


def test_a_balance_is_told_only_by_the_ledger_itself() -> None:
    for of, bill, reply, _ in CASES.values():
        members = json.loads(session_members(of, bill, reply).removeprefix(b',"x_tollgate":'))
        assert ("balance" in members) == isinstance(reply, Settled)
        assert (b"x-tollgate-balance" in dict(bill_headers(of, bill, reply))) == isinstance(reply, Settled)
