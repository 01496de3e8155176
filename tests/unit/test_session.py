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


VOID = (Charge.NOTHING, "void")
COMPLETED = (Charge.REPORTED, "completed")
CUT = (Charge.COUNTED, "cut")
ABORTED = (Charge.COUNTED, "aborted")
ERROR = (Charge.COUNTED, "error")
PROMPT = (Charge.PROMPT, "aborted")
FINISHED = (Charge.REPORTED, "aborted")
OURS = (VOID, VOID, VOID, ERROR)

WHO_PAYS = {
    # (ending, stream): what is charged in the phases held, sent, answered and content; None: it cannot happen there
    (Ending.COMPLETED, True): (None, None, COMPLETED, COMPLETED),
    (Ending.COMPLETED, False): (None, None, COMPLETED, COMPLETED),
    (Ending.CREDIT_CUT, True): (None, None, CUT, CUT),
    (Ending.CREDIT_CUT, False): (None, None, None, None),
    (Ending.UPSTREAM_FAILED, True): (VOID, VOID, VOID, ERROR),
    (Ending.UPSTREAM_FAILED, False): (VOID, VOID, VOID, VOID),
    (Ending.CLIENT_GONE, True): (VOID, VOID, ABORTED, ABORTED),
    (Ending.CLIENT_GONE, False): (VOID, PROMPT, PROMPT, FINISHED),
    (Ending.CLIENT_STALLED, True): (VOID, VOID, ABORTED, ABORTED),
    (Ending.CLIENT_STALLED, False): (None, None, None, None),
    **{
        (ending, stream): OURS
        for ending in (Ending.LEASE_LOST, Ending.SHUTDOWN, Ending.INTERNAL)
        for stream in (True, False)
    },
}


@pytest.mark.parametrize(("ending", "stream"), WHO_PAYS)
@pytest.mark.parametrize("phase", RUNNING)
def test_who_pays_when(ending: Ending, stream: bool, phase: Phase) -> None:
    expected = WHO_PAYS[ending, stream][RUNNING.index(phase)]
    if expected is not None:
        assert charge_for(ending, phase, stream=stream) == expected
        return
    with pytest.raises(IllegalMove):
        charge_for(ending, phase, stream=stream)


def test_no_row_is_missing_from_the_table_above_and_none_is_beyond_it() -> None:
    assert WHO_PAYS.keys() == set(itertools.product(Ending, (True, False)))
    assert {(ending, stream) for ending, _, stream in CHARGES} <= WHO_PAYS.keys()
    assert all(phase in RUNNING for _, phase, _ in CHARGES)
