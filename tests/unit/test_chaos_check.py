"""The chaos check: it passes what is right, and finds each wrong micro on its own, in whichever record it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loadtests.chaos.check import (
    UNBILLED_TOKENS,
    AccountState,
    ChaosVerdict,
    Evidence,
    GrantState,
    check_account,
    check_audit,
    check_grant,
    check_sessions,
)
from loadtests.simulated_provider.text import count
from loadtests.users.calls import Call

SAID = "You asked about tolls, so here is what I think. " * 3
PROMPT = 9
WHOLE = PROMPT + count(SAID)


def row(name: str, outcome: str, charged: int, source: str = "counted") -> dict[str, Any]:
    """A session as Postgres has it."""
    metadata = json.dumps({"request_id": f"r-{name}"})
    return {
        "sid": f"s-{name}",
        "account_id": "acc",
        "outcome": outcome,
        "charged": charged,
        "absorbed": 0,
        "source": source,
        "metadata": metadata,
    }


def served(name: str, text: str = SAID, started_ms: int = 1, prompt: int = PROMPT) -> dict[str, Any]:
    """A line of a provider's log."""
    tokens = count(text)
    return {
        "n": 1,
        "request_id": f"r-{name}",
        "started_ms": started_ms,
        "prompt_tokens": prompt,
        "served_tokens": tokens,
        "completion_tokens": tokens,
        "usage_sent": {"prompt_tokens": prompt, "completion_tokens": tokens},
        "text": text,
    }


def call(name: str, ending: str, text: str = "", told: int | None = None) -> Call:
    """What a client knows."""
    return Call("streaming", "m", True, ending=ending, session=f"s-{name}", told_micros=told, text=text)


class Run:
    """A small run in which everything agrees."""

    def __init__(self) -> None:
        self.rows = [
            row("whole", "completed", WHOLE, "provider"),
            row("left", "aborted", PROMPT + count(SAID[:40])),
            row("broken", "error", WHOLE),
            row("swept", "swept", WHOLE - 5),
            row("never", "void", 0),
            row("early", "swept", 0),
            row("storm", "completed", 77),
        ]
        self.served = [
            served("whole", started_ms=2),
            served("whole", "", started_ms=1, prompt=0),
            served("left"),
            served("broken"),
            served("swept"),
        ]
        self.calls = [
            call("whole", "completed", told=WHOLE),
            call("left", "aborted", SAID[:20]),
            call("broken", "broken", SAID[:30]),
            call("swept", "failed", SAID),
            call("never", "refused"),
        ]
        self.by_hand = {"s-storm": 77}
        self.bound: int | None = UNBILLED_TOKENS
        self.absorbs = self.forked = False
        self.accounts = [AccountState("acc", 1_000, 1_000 - 400 - 50, 0, 0, 0, 400, 400, 400, 50)]
        self.grants = [
            GrantState("open", 800, 500, 0, 300, 0, 0, 800, 300, 0, 0),
            GrantState("over", 200, 0, 0, 100, 50, 50, 200, 100, 50, 50, over=True),
        ]
        self.audit: dict[str, Any] = {"accounts": 1, "differences": [], "pending_grants": []}

    def verdict(self) -> ChaosVerdict:
        found = ChaosVerdict()
        check_sessions(
            Evidence(
                self.rows, self.served, self.calls, self.by_hand, self.absorbs, self.forked, unbilled_bound=self.bound
            ),
            found,
        )
        for state in self.accounts:
            check_account(state, found)
        for grant in self.grants:
            check_grant(grant, found)
        check_audit(self.audit, found)
        return found


def test_a_run_in_which_everything_agrees_passes() -> None:
    verdict = Run().verdict()
    assert (verdict.findings, verdict.micros) == ([], 0)
    assert verdict.unbilled_max == 0  # five tokens less than delivered, which is less than the prompt
    assert verdict.checked["charges told to clients"] == 1


def _row_wrong(number: int, change: int) -> Callable[[Run], None]:
    def spoil(run: Run) -> None:
        run.rows[number]["charged"] += change

    return spoil


def _account_wrong(**changes: int) -> Callable[[Run], None]:
    def spoil(run: Run) -> None:
        given = {name: getattr(run.accounts[0], name) + change for name, change in changes.items()}
        run.accounts[0] = replace(run.accounts[0], **given)

    return spoil


def _grant_wrong(number: int, **changes: int) -> Callable[[Run], None]:
    def spoil(run: Run) -> None:
        given = {name: getattr(run.grants[number], name) + change for name, change in changes.items()}
        run.grants[number] = replace(run.grants[number], **given)

    return spoil


WRONG: dict[str, tuple[Callable[[Run], object], int]] = {
    # what is spoilt -> how, and how many micros the check must say are off (at least)
    "a micro too much in a completed row": (_row_wrong(0, 1), 1),
    "a micro too little in a completed row": (_row_wrong(0, -1), 1),
    "more than was served in a broken row": (_row_wrong(2, 1), 1),
    "more than was served in a swept row": (_row_wrong(3, 6), 1),
    "a void that cost something": (_row_wrong(4, 1), 1),
    "a charge for what nobody served": (_row_wrong(5, 3), 3),
    "another charge than the storm's": (_row_wrong(6, -2), 2),
    "a micro lost in Redis": (_account_wrong(available=-1), 1),
    "a micro created in Redis": (_account_wrong(available=1), 1),
    "a hold that never ended": (_account_wrong(held=10, available=-10), 20),
    "a charge that Postgres lacks": (_account_wrong(charged_rows=-4), 12),
    "a charge that Redis lacks": (_account_wrong(consumed=-1), 1),
    "a debt": (_account_wrong(debt=2), 2),
    "a difference of the audit": (
        lambda run: run.audit["differences"].append(
            {"account": "acc", "what": "I2", "redis": 1, "postgres": 2, "micros": 1}
        ),
        1,
    ),
    "a grant that waits": (lambda run: run.audit["pending_grants"].append("g1"), 0),
    "an open session": (_account_wrong(open_sessions=1), 0),
    "a session that Postgres lacks": (lambda run: run.rows.pop(0), WHOLE),
    "a session that its client was told of and Postgres lacks": (
        lambda run: run.calls.append(call("ghost", "failed")),
        0,
    ),
    "a storm that Postgres lacks": (lambda run: run.rows.pop(6), 0),
    "another charge than its client was told": (lambda run: setattr(run.calls[0], "told_micros", WHOLE + 1), 1),
    "less than was delivered to a client that left": (lambda run: setattr(run.calls[1], "text", SAID), 0),
    "content for nothing": (lambda run: setattr(run.calls[4], "text", "Hello"), 0),
    "a grant that expired in Redis only": (_grant_wrong(0, available=-5, expired=5), 5),
    "a grant that lost a micro": (_grant_wrong(0, available=-1), 1),
    "a grant that is held for ever": (_grant_wrong(0, available=-3, held=3), 3),
    "a grant that Postgres has more of": (_grant_wrong(0, issued_rows=1), 1),
    "a consumption that Postgres lacks": (_grant_wrong(0, consumed_rows=-2), 2),
    "a void that Postgres lacks": (_grant_wrong(1, voided_rows=-1), 1),
    "credit that can be spent after its time": (
        _grant_wrong(1, available=4, expired=-4, expired_rows=-4),
        8,
    ),
    "breakage of what was spent": (_grant_wrong(1, expired=1, expired_rows=1, available=-1), 1),
    "an account that lacks its breakage": (_account_wrong(expired_rows=-1), 1),
    "something that the house absorbed": (lambda run: run.rows[0].update(absorbed=1), 1),
}


@pytest.mark.parametrize("what", WRONG)
def test_each_wrong_thing_alone_is_found_and_counted(what: str) -> None:
    spoil, least = WRONG[what]
    run = copy.deepcopy(Run())
    spoil(run)
    verdict = run.verdict()
    assert len(verdict.findings) >= 1
    assert verdict.micros >= least


def test_what_a_killed_gateway_gave_away_is_counted_and_held_to_its_bound() -> None:
    run = Run()
    much = "word " * (UNBILLED_TOKENS + 50)
    run.served[4] = served("swept", much)
    run.calls[3].text = much
    run.rows[3]["charged"] = PROMPT
    verdict = run.verdict()
    assert verdict.unbilled_max == count(much) - PROMPT > UNBILLED_TOKENS
    assert [finding for finding in verdict.findings if "not charged" in finding] != []
    assert verdict.micros == 0  # a bound was broken, but no micro was lost or created
    run.bound = None
    assert run.verdict().ok


def test_what_was_told_of_credit_that_two_primaries_sold_is_what_was_paid_and_what_the_house_absorbed() -> None:
    run = Run()
    run.absorbs = True
    run.rows[0]["charged"] -= 5
    run.rows[0]["absorbed"] = 5
    assert run.verdict().micros == 5  # the client was told more than was charged, and there was one primary
    run.forked = True
    assert run.verdict().findings == []
    run.rows[0]["absorbed"] = 4
    assert run.verdict().micros >= 1
