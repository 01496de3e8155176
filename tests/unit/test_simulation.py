"""The session core under 2,000 seeded schedules, and schedules that once showed a fault, by name.

`make simulate` runs a hundred thousand. A failure names its seed; `make simulate REPLAY=<seed>` runs it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from providers.breaker import State
from proxy.answer import credits_text
from proxy.errors import LeaseLost
from proxy.session import Ending
from tests.support.simulation.cases import Case
from tests.support.simulation.paths import PATHS
from tests.support.simulation.runs import batch, never_reached
from tests.support.simulation.schedule import Schedule, entered
from tests.support.simulation.server import Row

PAST_FENCE_S = 10.0
FIRST, SCHEDULES = 0, 2_000


def test_no_schedule_breaks_a_promise_and_every_ending_and_path_is_reached() -> None:
    found = batch(FIRST, SCHEDULES)
    assert found.failed == []
    assert found.missing() == []
    assert found.reached.total() > SCHEDULES / 2  # else the schedules are too busy with other things


def test_a_seed_is_the_same_schedule_every_time() -> None:
    first = [batch(seed, 1) for seed in range(20)]
    assert [batch(seed, 1) for seed in range(20)] == first
    assert len({str(each) for each in first}) > 10


def test_all_endings_and_paths_are_counted_as_missing_when_none_was_reached() -> None:
    assert never_reached(Counter(), Counter(), PATHS) == sorted(set(Ending) - {Ending.CACHED}) + sorted(PATHS)


def test_a_path_that_nothing_took_is_told() -> None:
    endings = Counter((ending.value, "CONTENT", True) for ending in Ending)
    assert never_reached(endings, Counter(dict.fromkeys(PATHS, 1) | {"continued": 0}), PATHS) == ["continued"]


@contextmanager
def answering(wanted: Callable[[Case], bool]) -> Iterator[tuple[Schedule, Case]]:
    """One call of the wanted kind at a provider that does well, connected and asked. The schedule's acts are the
    test's; at the end everything must be in order."""
    for seed in range(1_000):
        with entered(seed, cases=1, trouble=0.0) as schedule:
            case = schedule.world.cases[0]
            schedule.admit_all()
            patient = case.route.hedge is None and case.route.policy.deadline_s > PAST_FENCE_S
            plain = patient and case.first.texts()
            if case.session is None or not wanted(case) or not plain:
                schedule.heal()
                continue
            schedule.dial()
            schedule.loop.settle()
            yield schedule, case
            schedule.heal()
            return
    raise AssertionError("no seed makes such a call")


def give_all(schedule: Schedule, case: Case) -> None:
    """The provider's whole answer arrives, and the ledger answers checkpoints, but nothing of the settlement."""
    _, socket = case.sockets[-1]
    while socket.has_more:
        socket.give(100)
        answer_checkpoints(schedule)


def answer_checkpoints(schedule: Schedule) -> None:
    """The ledger answers everything that is not the settlement."""
    schedule.loop.settle()
    while schedule.world.wire.line and schedule.world.wire.line[0].verb == "progress":
        schedule.world.wire.run_next()
        schedule.world.wire.reply_next()
        schedule.loop.settle()


def words(case: Case) -> int:
    return sum(text.count(" ") for text in case.first.texts().values())


def settling(schedule: Schedule) -> bool:
    return [call.verb for call in schedule.world.wire.line] == ["settle"]


def test_a_worker_that_slept_through_its_settlement_writes_nothing_more() -> None:
    with answering(lambda case: case.request.stream) as (schedule, case):
        give_all(schedule, case)
        assert settling(schedule)
        before = bytes(case.client.body)
        schedule.pass_time(PAST_FENCE_S)
        schedule.world.server.sweep()
        schedule.loop.settle()
        assert case.over
        assert bytes(case.client.body) == before


@contextmanager
def unknown_at_the_fence() -> Iterator[tuple[Schedule, Case]]:
    """A whole answer whose settlement has not been answered when its fence is past: nothing of it has left."""
    with answering(lambda case: not case.request.stream) as (schedule, case):
        give_all(schedule, case)
        assert settling(schedule)
        schedule.pass_time(PAST_FENCE_S)
        schedule.loop.settle()
        assert not case.over
        assert bytes(case.client.body) == b""
        yield schedule, case


def settlement(schedule: Schedule, case: Case) -> Row:
    """The ledger runs the settlement and answers; the session's row."""
    while schedule.world.wire.run_next():
        schedule.world.wire.reply_next()
    schedule.loop.settle()
    return schedule.world.server.rows[case.sid]


def test_a_whole_answer_whose_settlement_is_unknown_at_the_fence_is_given_once_it_is_charged() -> None:
    with unknown_at_the_fence() as (schedule, case):
        row = settlement(schedule, case)
        assert (row.outcome, row.charged > 0) == ("completed", True)
        assert case.over
        assert (case.error, case.client.status) == (None, 200)


def test_a_whole_answer_that_a_sweeper_ended_is_kept_back_and_costs_what_the_sweep_charged() -> None:
    with unknown_at_the_fence() as (schedule, case):
        schedule.world.server.sweep()
        row = settlement(schedule, case)
        assert (row.outcome, row.corrected) == ("swept", None)
        assert case.over
        assert isinstance(case.error, LeaseLost)
        assert (b"x-tollgate-charge", credits_text(row.charged).encode()) in case.error.headers


def test_a_comment_that_was_due_before_the_fence_is_not_written_after_it() -> None:
    with answering(lambda case: case.request.stream) as (schedule, case):
        loop, before = schedule.loop, len(schedule.loop.tasks)
        while len(loop.tasks) == before:  # until a tick has made the task that writes it
            if loop.idle:
                schedule.pass_time(0.1)
            loop.turn()
        loop.suspend(int(PAST_FENCE_S * 1000))
        schedule.world.server.now += int(PAST_FENCE_S * 1000)
        loop.settle()
        assert bytes(case.client.body) == b""
        assert not case.client.response_started


def test_a_slow_reader_gets_nothing_that_waited_past_the_fence() -> None:
    with answering(lambda case: case.request.stream) as (schedule, case):
        case.client.pause()
        give_all(schedule, case)
        assert case.session is not None
        assert case.session.client is not None
        assert case.session.client.writing_since is not None
        schedule.loop.suspend(int(PAST_FENCE_S * 1000))
        schedule.world.server.now += int(PAST_FENCE_S * 1000)
        case.client.resume()
        schedule.loop.settle()
        assert bytes(case.client.body) == b""


def test_a_response_begins_once_when_its_client_reads_again_just_as_content_comes() -> None:
    with answering(lambda case: case.request.stream and words(case) <= 8) as (schedule, case):
        case.client.pause()
        schedule.pass_time(1.0)  # the tick begins the response before there is content, and must wait for the client
        schedule.loop.settle()
        assert case.session is not None
        assert case.session.client is not None
        assert case.session.client.writing_since is not None
        case.client.resume()
        case.sockets[-1][1].give(100_000)
        schedule.loop.settle()
        assert case.client.body.startswith(b": tollgate\n\ndata: ")


def test_a_probe_whose_call_is_cancelled_is_handed_back() -> None:
    for seed in range(20):
        with entered(seed, cases=1, trouble=0.0) as schedule:
            case, breaker = schedule.world.cases[0], schedule.world.known[0].live.breaker
            while breaker.state is State.CLOSED:
                permit = breaker.try_pass(schedule.loop.time())
                assert permit is not None
                breaker.failed(permit, schedule.loop.time())
            schedule.pass_time(1.0)  # longer than any policy here stays open
            schedule.admit_all()
            if case.tried and case.tried[0].at == 0:
                assert breaker.state is State.HALF_OPEN
                schedule.dial()
                schedule.loop.settle()
                schedule._cancel(case)
                schedule.loop.settle()
                assert breaker.blocked_s(schedule.loop.time()) == 0.0
                schedule.heal()
                return
            schedule.heal()
    raise AssertionError("no seed makes such a call")


def test_a_stream_that_fails_by_its_clients_fault_is_not_continued() -> None:
    tried = 0
    for seed in range(2_000):
        with entered(seed, cases=1, trouble=0.5) as schedule:
            case = schedule.world.cases[0]
            route = case.route
            ready = case.first.final and case.first.texts() and route.hedge is None and route.policy.attempts_max > 1
            if not ready or not route.policy.continuation or len(route.candidates) == 1:
                continue
            schedule.admit_all()
            if case.tried:
                schedule.dial()
                schedule.loop.settle()
                give_all(schedule, case)
                tried += bool(case.witness.texts)
                assert len(case.tried) == (1 if case.witness.texts else len(case.tried))
            schedule.heal()
            if tried == 3:
                return
    raise AssertionError("no seed makes such a call")
