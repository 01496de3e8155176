"""The session's tables: every ending has a row for every phase it can happen in, and the rows say who pays."""

from __future__ import annotations

import itertools

import pytest

from proxy.session import CHARGES, MOVES, Charge, Ending, IllegalMove, Phase, charge_for, may_move

RUNNING = (Phase.HELD, Phase.SENT, Phase.ANSWERED, Phase.CONTENT)


def test_phases_only_move_along_the_table() -> None:
    for now, then in itertools.product(Phase, Phase):
        if then in MOVES[now]:
            may_move(now, then)
        else:
            with pytest.raises(IllegalMove):
                may_move(now, then)


def test_a_settled_session_never_moves_again() -> None:
    assert MOVES[Phase.FINAL] == frozenset()
    assert MOVES[Phase.SETTLING] == {Phase.FINAL}


ALWAYS_POSSIBLE = (Ending.CLIENT_GONE, Ending.UPSTREAM_FAILED, Ending.LEASE_LOST, Ending.SHUTDOWN, Ending.INTERNAL)


@pytest.mark.parametrize("ending", ALWAYS_POSSIBLE)
@pytest.mark.parametrize("phase", RUNNING)
@pytest.mark.parametrize("stream", [True, False])
def test_what_can_happen_any_time_has_a_row(ending: Ending, phase: Phase, stream: bool) -> None:
    charge, outcome = charge_for(ending, phase, stream=stream)
    assert (charge is Charge.NOTHING) == (outcome == "void")


WHO_PAYS = [
    (Ending.COMPLETED, Phase.CONTENT, True, Charge.REPORTED, "completed"),
    (Ending.COMPLETED, Phase.CONTENT, False, Charge.REPORTED, "completed"),
    (Ending.CREDIT_CUT, Phase.CONTENT, True, Charge.COUNTED, "cut"),
    (Ending.UPSTREAM_FAILED, Phase.SENT, True, Charge.NOTHING, "void"),
    (Ending.UPSTREAM_FAILED, Phase.ANSWERED, True, Charge.NOTHING, "void"),
    (Ending.UPSTREAM_FAILED, Phase.CONTENT, True, Charge.COUNTED, "error"),
    (Ending.UPSTREAM_FAILED, Phase.SENT, False, Charge.NOTHING, "void"),
    (Ending.CLIENT_GONE, Phase.HELD, True, Charge.NOTHING, "void"),
    (Ending.CLIENT_GONE, Phase.SENT, True, Charge.NOTHING, "void"),
    (Ending.CLIENT_GONE, Phase.ANSWERED, True, Charge.COUNTED, "aborted"),
    (Ending.CLIENT_GONE, Phase.CONTENT, True, Charge.COUNTED, "aborted"),
    (Ending.CLIENT_GONE, Phase.SENT, False, Charge.PROMPT, "aborted"),
    (Ending.CLIENT_STALLED, Phase.CONTENT, True, Charge.COUNTED, "aborted"),
    (Ending.LEASE_LOST, Phase.CONTENT, True, Charge.COUNTED, "error"),
    (Ending.SHUTDOWN, Phase.SENT, True, Charge.NOTHING, "void"),
    (Ending.SHUTDOWN, Phase.CONTENT, True, Charge.COUNTED, "error"),
]


@pytest.mark.parametrize(("ending", "phase", "stream", "charge", "outcome"), WHO_PAYS)
def test_who_pays_when(ending: Ending, phase: Phase, stream: bool, charge: Charge, outcome: str) -> None:
    assert charge_for(ending, phase, stream=stream) == (charge, outcome)


def test_impossible_endings_are_refused() -> None:
    for ending, phase in (
        (Ending.COMPLETED, Phase.HELD),
        (Ending.CREDIT_CUT, Phase.SENT),
        (Ending.COMPLETED, Phase.FINAL),
    ):
        assert (ending, phase, True) not in CHARGES
        with pytest.raises(IllegalMove):
            charge_for(ending, phase, stream=True)
