"""The load test's own check: it passes what is right, and each wrong thing on its own is found and named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.reconcile import Verdict, between, check_account, check_keys, check_sessions
from loadtests.simulated_provider.text import count
from loadtests.soak import fit, judge
from loadtests.users.calls import Call, micros
from loadtests.users.wire import Frames, Response, WireError

SAID = "You asked about tolls, so here is what I think."
PROMPT = 9


def session(name: str, state: str, charged: int) -> dict[str, Any]:
    return {
        "id": f"s-{name}",
        "state": state,
        "charged_micros": charged,
        "absorbed_micros": 0,
        "metadata": {"request_id": f"r-{name}"},
    }


def served(name: str, n: int, text: str = SAID, prompt: int = PROMPT) -> dict[str, Any]:
    tokens = count(text)
    return {
        "n": n,
        "request_id": f"r-{name}",
        "prompt_tokens": prompt,
        "served_tokens": tokens,
        "completion_tokens": tokens,
        "text": text,
    }


def call(name: str, ending: str, text: str = "", told: int | None = None) -> dict[str, Any]:
    known = json.loads(
        Call("streaming", "gpt-4o-mini", True, ending=ending, session=f"s-{name}", told_micros=told).line()
    )
    return {**known, "text": text}


class Run:
    """A small run in which everything agrees: completed, failed over, left, broken and void sessions."""

    def __init__(self) -> None:
        whole = PROMPT + count(SAID)
        self.sessions = [
            session("whole", "completed", whole),
            session("over", "completed", whole),
            session("left", "aborted", PROMPT + count(SAID[:20])),
            session("unknown", "aborted", PROMPT),
            session("broken", "error", whole),
            session("nothing", "void", 0),
        ]
        self.served = [
            served("whole", 1),
            served("over", 2, "", prompt=0),
            served("over", 3),
            served("left", 4),
            served("unknown", 5, "", prompt=PROMPT),
            served("broken", 6),
            served("nothing", 7, "", prompt=0),
        ]
        self.calls = [
            call("whole", "completed", told=whole),
            call("left", "aborted", SAID[:9]),
            call("broken", "broken", SAID),
            call("nothing", "aborted"),
            {**call("gone before a head", "aborted"), "session": None},
        ]

    def findings(self) -> list[str]:
        verdict = Verdict()
        check_sessions(self.sessions, self.served, self.calls, verdict)
        return verdict.findings

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.sessions if row["id"] == f"s-{name}")

    def client(self, name: str) -> dict[str, Any]:
        return next(known for known in self.calls if known["session"] == f"s-{name}")


def test_a_run_in_which_everything_agrees_passes() -> None:
    assert Run().findings() == []


def charge(name: str, by: int) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.row(name)["charged_micros"] += by

    return change


def client_says(name: str, **fields: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.client(name).update(fields)

    return change


def row_says(name: str, **fields: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.row(name).update(fields)

    return change


def without_session(run: Run) -> None:
    run.sessions.pop(0)


def without_entry(run: Run) -> None:
    run.served.pop(0)


WRONG: dict[str, tuple[Callable[[Run], None], str]] = {
    "a completed call costs one more": (charge("whole", 1), "s-whole (completed): charge"),
    "a completed call costs one less": (charge("over", -1), "s-over (completed): charge"),
    "a client was told another charge": (client_says("whole", told_micros=1), "told to its client"),
    "one who left pays more than was served": (charge("left", 100), "s-left (aborted): 104 tokens"),
    "one who left pays less than was delivered": (charge("left", -3), "s-left (aborted): 1 tokens"),
    "what was delivered is not what was served": (client_says("left", text="Me asked"), "s-left (aborted)"),
    "a broken answer costs one less": (charge("broken", -1), "s-broken (error): charge"),
    "a void session costs": (charge("nothing", 1), "s-nothing (void): charge"),
    "a void session delivered": (client_says("nothing", text="You"), "had read content"),
    "the house paid": (row_says("whole", absorbed_micros=1), "absorbed"),
    "a session runs for ever": (row_says("left", state="running"), "s-left (running)"),
    "a session was swept": (row_says("left", state="swept"), "s-left (swept)"),
    "a whole answer is booked as left": (row_says("whole", state="aborted"), "its client saw 'completed'"),
    "a session is missing": (without_session, "has no session"),
    "the provider never saw it": (without_entry, "log does not know request r-whole"),
    "a client knows a session that is nowhere": (
        lambda run: run.calls.append(call("ghost", "aborted")),
        "['s-ghost']",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_session_is_found(name: str) -> None:
    change, expected = WRONG[name]
    run = Run()
    change(run)
    assert [finding for finding in run.findings() if expected in finding] != []


def test_a_charge_may_be_what_any_cut_between_delivered_and_served_counts() -> None:
    text = " ab" + "strac" + "t"  # one word is fewer tokens than its beginning
    cuts = {count(text[:end]) for end in range(1, len(text) + 1)}
    assert max(cuts) > count(text)
    assert all(between(text[:1], tokens, text, count(text)) for tokens in cuts)
    assert not between(text[:1], max(cuts) + 1, text, count(text))
    assert not between(text, count(text) - 1, text, count(text))


SHOWN: dict[str, Any] = {
    "balance": {"available_micros": 70, "held_micros": 0, "debt_micros": 0, "charged_micros": 30, "open_sessions": 0},
    "grants": [{"issued_micros": 100, "consumed_micros": 30}],
}


def account(shown: dict[str, Any]) -> list[str]:
    verdict = Verdict()
    check_account("load-1", shown, [session("a", "completed", 10), session("b", "aborted", 20)], verdict)
    return verdict.findings


def test_an_account_whose_charges_are_what_its_grants_lost_passes() -> None:
    assert account(SHOWN) == []


@pytest.mark.parametrize("field", SHOWN["balance"])
def test_an_account_that_differs_by_one_is_found(field: str) -> None:
    shown = copy.deepcopy(SHOWN)
    shown["balance"][field] += 1
    assert len(account(shown)) == 1


def test_a_grant_that_lost_another_sum_is_found() -> None:
    shown = copy.deepcopy(SHOWN)
    shown["grants"][0]["consumed_micros"] -= 1
    assert len(account(shown)) == 1


def keys(after: dict[str, int], finished: int) -> list[str]:
    verdict = Verdict()
    check_keys({"m:{v001}", "s:{v001}:old"}, {"m:{v001}": -1, **after}, finished, verdict)
    return verdict.findings


def test_new_keys_are_records_of_finished_sessions_with_an_end() -> None:
    records = {"s:{v001}:a": 86_400_000, "s:{v002}:b": 1}
    assert keys(records, 2) == []
    assert "session records in Redis: 2, expected 1" in keys(records, 1)
    assert "{v001}:a" in keys({**records, "s:{v001}:a": -1}, 2)[0]
    assert "outlive" in keys({**records, "s:{v001}:a": 86_400_001}, 2)[0]
    assert "x:{v001}" in keys({**records, "x:{v001}": 5}, 2)[0]


# -- The soak's verdict -----------------------------------------------------------------------------------------------


def soak(rise_mib_per_hour: float, *, minutes: int = 30, **last: float) -> list[str]:
    rows = [
        {
            "seconds": at,
            "worker-0_mib": 110 + rise_mib_per_hour * at / 3600 + 0.05 * (at % 20),
            "redis_keys": 300 + at,
            "redis_lasting_keys": 280.0,
            "redis_mib": 2 + at * 500 / 1024**2,
        }
        for at in map(float, range(0, minutes * 60, 10))
    ]
    rows[-1] |= last
    verdict = Verdict()
    judge(rows, 10, minutes, verdict)
    return verdict.findings


def test_memory_that_holds_still_passes_and_a_leak_is_found() -> None:
    assert soak(0) == soak(5) == []
    assert len(soak(20)) == 1
    assert soak(20, minutes=5) == []


def test_keys_without_an_end_and_large_records_are_found() -> None:
    assert soak(0, redis_lasting_keys=300) == []
    assert len(soak(0, redis_lasting_keys=301)) == 1
    assert len(soak(0, redis_mib=200)) == 1


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_a_straight_line_is_fitted_exactly(rise: float, start: float) -> None:
    line = fit([(float(at), start + rise * at / 3600) for at in range(0, 1000, 10)])
    assert line.per_hour == pytest.approx(rise, abs=1e-6)
    assert line.error == pytest.approx(0, abs=1e-6)


def test_too_few_points_say_nothing() -> None:
    assert fit([(0, 1), (1, 2)]).error == fit([(1, 1), (1, 2), (1, 3)]).error == float("inf")


# -- The clients' wire ------------------------------------------------------------------------------------------------

BODY = b'data: {"a":1}\n\n: comment\n\ndata: [DONE]\n\n'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:30], BODY[30:], b"")
)
SIZED = b"HTTP/1.1 402 Payment Required\r\nContent-Length: 5\r\n\r\nhello"


def parsed(raw: bytes, cuts: list[int]) -> tuple[Response, bytes]:
    response, body, at = Response(), b"", 0
    for end in [*sorted(cut % len(raw) for cut in cuts), len(raw)]:
        body += response.feed(raw[at:end])
        at = end
    return response, body


@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_a_response_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    response, body = parsed(CHUNKED, cuts)
    assert (response.status, response.done, body) == (200, True, BODY)
    response, body = parsed(SIZED, cuts)
    assert (response.status, response.done, body) == (402, True, b"hello")


def test_a_response_that_stops_early_is_not_done() -> None:
    for raw in (CHUNKED, SIZED):
        response = Response()
        response.feed(raw[:-1])
        assert not response.done


@pytest.mark.parametrize("raw", [b"SSH-2.0\r\n\r\n", SIZED + b"!", CHUNKED.replace(b"\r\n7\r\n", b"\r\nx\r\n", 1)])
def test_what_is_no_response_is_an_error(raw: bytes) -> None:
    with pytest.raises(WireError):
        Response().feed(raw)


@given(st.integers(0, len(BODY)))
def test_frames_come_whole_and_comments_do_not(cut: int) -> None:
    frames = Frames()
    assert [*frames.feed(BODY[:cut]), *frames.feed(BODY[cut:])] == [b'{"a":1}', b"[DONE]"]


def test_credits_are_exact_micros() -> None:
    assert micros("0.000019") == 19
    with pytest.raises(ValueError, match="no whole number"):
        micros("0.0000005")
