"""The session's tables: every ending has a row for every phase it can happen in, and the rows say who pays."""

from __future__ import annotations

import itertools

import pytest

from config.price import CompiledPrice
from metering.ledger import AccountRef, SessionRef
from metering.meter import Meter
from metering.ranks import encoding
from proxy.live_session import LiveSession
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


@pytest.mark.parametrize("may_fall_back", [False, True])
def test_an_attempt_is_metered_from_its_answer_on_or_from_its_content_where_another_could_follow(
    may_fall_back: bool,
) -> None:
    price = CompiledPrice(
        input=1_000_000, cached_input=0, cache_write=0, cache_write_1h=0, output=0, reasoning=0, audio_input=0,
        audio_output=0, image_output=0,
    )  # fmt: skip
    session = LiveSession(
        SessionRef("s", AccountRef("u", 0), "k", 1), "r", "route", True,
        held=9, hold_max=9, slice_cost=1, slice_low_cost=1, fence_ms=0,
    )  # fmt: skip
    seen: list[int] = []
    for _ in range(2):  # the first attempt fails after its answer, the second one does not
        session.meter, session.may_fall_back = Meter(price, 7, encoding("o200k_base")), may_fall_back and not seen
        session.phase = Phase.SENT
        seen.append(session.metered_now())
        session.phase = Phase.ANSWERED
        seen.append(session.metered_now())
        session.phase = Phase.HELD
        seen.append(session.metered_now())
    assert seen == ([0, 0, 0, 0, 7, 7] if may_fall_back else [0, 7, 7, 7, 7, 7])
    session.may_fall_back, session.phase = True, Phase.CONTENT
    assert session.metered_now() == 7


VOID = (Charge.NOTHING, "void")
COMPLETED = (Charge.REPORTED, "completed")
CACHED = (Charge.CACHED, "completed")
CUT = (Charge.COUNTED, "cut")
ABORTED = (Charge.COUNTED, "aborted")
ERROR = (Charge.COUNTED, "error")
PROMPT = (Charge.PROMPT, "aborted")
FINISHED = (Charge.REPORTED, "aborted")
OURS = {True: (VOID, VOID, VOID, ERROR), False: (VOID, VOID, VOID, VOID)}

WHO_PAYS = {
    # (ending, stream): what is charged in the phases held, sent, answered and content; None: it cannot happen there
    (Ending.COMPLETED, True): (None, None, COMPLETED, COMPLETED),
    (Ending.COMPLETED, False): (None, None, COMPLETED, COMPLETED),
    (Ending.CACHED, True): (CACHED, None, None, None),
    (Ending.CACHED, False): (CACHED, None, None, None),
    (Ending.CREDIT_CUT, True): (None, None, CUT, CUT),
    (Ending.CREDIT_CUT, False): (None, None, None, None),
    (Ending.UPSTREAM_FAILED, True): (VOID, VOID, VOID, ERROR),
    (Ending.UPSTREAM_FAILED, False): (VOID, VOID, VOID, VOID),
    (Ending.CLIENT_GONE, True): (VOID, VOID, ABORTED, ABORTED),
    (Ending.CLIENT_GONE, False): (VOID, PROMPT, PROMPT, FINISHED),
    (Ending.CLIENT_STALLED, True): (VOID, VOID, ABORTED, ABORTED),
    (Ending.CLIENT_STALLED, False): (None, None, None, None),
    **{
        (ending, stream): OURS[stream]
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
