"""What gateways tell each other about a breaker: they agree whatever the order, and no schedule passes a bound."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from providers.breaker import Breaker, BreakerPolicy, Change, Permit, State
from providers.breaker_record import MS_MAX, RECORD_BYTES, Reason, Record, decode, encode, merge
from tests.unit.test_breaker import POLICY, WALL_S, breaker, fail, succeed, trip

CLOSED, OPEN = State.CLOSED, State.OPEN

records = st.builds(
    Record,
    era=st.integers(0, 5),
    open=st.booleans(),
    until_ms=st.integers(0, 3) | st.integers(0, MS_MAX),
    strikes=st.integers(0, 255),
    reason=st.sampled_from(Reason),
    at_ms=st.integers(0, 2) | st.integers(0, MS_MAX),
)


@settings(deadline=None)
@given(records, records, records)
def test_merging_is_commutative_associative_idempotent_and_the_order_of_strings(
    a: Record, b: Record, c: Record
) -> None:
    x, y, z = encode(a), encode(b), encode(c)
    assert decode(x) == a
    assert len(x) == RECORD_BYTES
    assert merge(x, y) == merge(y, x) == encode(max(a, b))
    assert merge(merge(x, y), z) == merge(x, merge(y, z))
    assert merge(x, x) == x
    assert (x < y) == (a < b)


@settings(deadline=None)
@given(st.binary(max_size=60) | records.map(encode).map(lambda data: b"2" + data[1:]))
def test_what_is_no_record_of_this_version_is_as_if_nothing_was_shared(data: bytes) -> None:
    it = breaker()
    assert decode(data) is None
    assert it.adopt(data, 0) is None
    assert it.state is CLOSED


def test_open_beats_closed_in_one_era_and_a_later_era_beats_both() -> None:
    opened, closed = Record(4, True, 5_000, 3, Reason.PROBE, 9), Record(4, False, 0, 9, Reason.NONE, 99_999)
    assert max(opened, closed) == opened
    assert max(opened, Record(5)) == Record(5)
    assert max(opened, Record(4, True, 6_000, 1)).until_ms == 6_000


def test_a_gateway_takes_over_what_another_found_and_its_healing() -> None:
    one, two = breaker(), breaker(wall_offset_s=WALL_S - 1_000)
    trip(one, 0)
    assert two.adopt(one.record(), 1_001) == Change(OPEN, Reason.CONSECUTIVE, 4.0, heard=True)
    assert two.record() == one.record()
    assert two.adopt(one.record(), 1_002) is None
    succeed(one, 5)
    assert two.adopt(one.record(), 1_005) == Change(CLOSED, Reason.NONE, heard=True)
    assert two.try_pass(1_005) is not None


def test_gateways_that_see_one_outage_back_off_as_one() -> None:
    many = [breaker() for _ in range(10)]
    for it in many:
        trip(it, 0)
    for it in many:
        for other in many:
            it.adopt(other.record(), 1)
    assert {it.record() for it in many} == {many[0].record()}
    again = fail(many[3], 6)
    assert again is not None
    assert again.open_s == 10.0


def test_another_clocks_time_is_cut_to_the_longest_that_is_known() -> None:
    it = breaker()
    it.adopt(encode(Record(1, True, MS_MAX, 1, Reason.PROBE)), 0)
    assert it.blocked_s(0) == POLICY.longest_s() == 900.0
    assert trip(breaker(), 0).open_s < POLICY.longest_s()


def test_what_was_found_later_wins_over_a_clock_that_is_ahead() -> None:
    ahead = encode(Record(1, True, int((WALL_S + 86_400) * 1000), 1, Reason.CONSECUTIVE))
    one, two = breaker(), breaker()
    one.adopt(ahead, 0)
    two.adopt(ahead, 0)
    assert fail(one, 900) is not None
    assert two.adopt(one.record(), 901) is not None
    assert two.blocked_s(901) == 9.0
    succeed(two, 910)
    assert one.adopt(two.record(), 911) == Change(CLOSED, Reason.NONE, heard=True)


def test_gateways_do_not_probe_all_at_once() -> None:
    one, two = breaker(), breaker(0.5, jitter=0.2)
    trip(one, 0)
    two.adopt(one.record(), 0)
    assert (one.blocked_s(0), two.blocked_s(0)) == (5.0, 5.5)


def test_a_probe_under_way_says_nothing_once_another_gateway_has_opened_anew() -> None:
    one, two = breaker(), breaker()
    trip(one, 0)
    two.adopt(one.record(), 0)
    probe = one.try_pass(5)
    assert probe is not None
    fail(two, 5)
    assert one.adopt(two.record(), 6) is not None
    assert one.succeeded(probe, 7) is None
    assert (one.state, two.state) == (OPEN, OPEN)


EVENTS = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["pass", "ok", "fail", "limited", "key", "drop", "publish", "listen"]),
    st.floats(0, 40),
)


@settings(deadline=None)
@given(st.lists(EVENTS, max_size=120), st.permutations([0, 1, 2]))
def test_any_schedule_keeps_the_bounds_and_any_order_of_gossip_agrees(
    events: list[tuple[int, str, float]], way: list[int]
) -> None:
    policy = BreakerPolicy(consecutive_max=2, calls_min=4, probes_max=2, jitter=0.3)
    gateways = [Breaker(policy, lambda: 0.7, WALL_S - 100 * index) for index in range(3)]
    under_way: list[list[Permit]] = [[], [], []]
    store, now = gateways[0].record(), 0.0
    for index, what, step in events:
        now += step
        it, mine, at = gateways[index], under_way[index], now + 100 * index
        before = decode(it.record())
        if what == "pass":
            blocked = it.blocked_s(at)
            permit = it.try_pass(at)
            assert (permit is None) == (blocked > 0)
            mine.extend([permit] if permit is not None else [])
        elif what == "publish":
            store = merge(store, it.record())
        elif what == "listen":
            it.adopt(store, at)
        elif mine:
            _tell(it, mine.pop(len(mine) // 2), what, at)
        after = decode(it.record())
        assert before is not None
        assert after is not None
        assert after >= before, "a record never goes back"
        assert it.blocked_s(at) <= policy.longest_s() + policy.open_s
        assert len(it._probes) <= policy.probes_max
    for index in [*way, *way]:
        store = merge(store, gateways[index].record())
        gateways[index].adopt(store, now + 100 * index)
    for index in way:
        gateways[index].adopt(store, now + 100 * index)
    assert {it.record() for it in gateways} == {store}
    last = decode(store)
    assert last is not None
    if last.reason is not Reason.RETRY_AFTER:  # such a pause ends by itself, wherever somebody asks
        assert {it.state is CLOSED for it in gateways} == {not last.open}


def _tell(it: Breaker, permit: Permit, what: str, at: float) -> None:
    if what == "ok":
        it.succeeded(permit, at)
    elif what == "drop":
        it.abandoned(permit)
    else:
        it.failed(permit, at, retry_after_s=20.0 if what == "limited" else None, key_refused=what == "key")


def test_every_order_of_hearing_ends_alike() -> None:
    heard = [
        encode(Record(3, True, 1_800_000_005_000, 2, Reason.PROBE)),
        encode(Record(3, False)),
        encode(Record(2, True, 1_800_000_900_000, 1, Reason.KEY_REFUSED)),
    ]
    ends = set()
    for ways in permutations(heard):
        it = breaker()
        for data in ways:
            it.adopt(data, 0)
        ends.add((it.record(), it.state, it.blocked_s(0)))
    assert ends == {(heard[0], OPEN, 5.0)}
