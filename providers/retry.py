"""What a failed attempt leads to, as one table: the same candidate again, the next one, or the caller's error. Pure.

Must not: wait, read a clock or know a provider. `RULES` is what docs/failover.md shows; each row is a test.
Backoff is full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015): draw x min(most, base x 2^n).
"""

from __future__ import annotations

from enum import Enum, IntEnum, StrEnum
from typing import Literal

import msgspec

from providers.events import FailureKind, ProviderFailure

Fault = (
    FailureKind
    | Literal[
        "model_missing",
        "connect",
        "connect_timeout",
        "head_timeout",
        "stall",
        "total_timeout",
        "closed",
        "protocol",
        "unsupported",
        "busy",
        "breaker_open",
    ]
)
"""A failure's name: the provider's kinds, the transport's, and our own reasons not to send at all."""


class Point(IntEnum):
    """How far an attempt had come: no response head; a head (2xx for streams) but no content; content delivered."""

    BEFORE_HEADERS = 0
    BEFORE_CONTENT = 1
    AFTER_CONTENT = 2


class Behaviour(Enum):
    """What a row of the table asks for, where counts, deadline and route allow it."""

    RETRY = "the same candidate again, then the next"
    ELSEWHERE = "the next candidate; the same again where none is left"
    NEXT = "the next candidate"
    IF_CONFIGURED = "the next candidate where the route falls back on it, else the caller's error"
    CONTINUE = "continued by the next candidate where the route continues streams, else an error in the stream"
    GIVE_UP = "the caller's error"


class Mark(Enum):
    """What the candidate's breaker is told: answers in the caller's fault are signs of health."""

    HEALTHY = "healthy"
    FAILURE = "failure"
    PAUSE = "a pause, where the provider asked for one"
    KEY_REFUSED = "key refused"
    MISSING = "model missing"
    NOTHING = "nothing"


class Action(StrEnum):
    """What to do now."""

    RETRY = "retry"
    NEXT = "next"
    GIVE_UP = "give_up"


class Rule(msgspec.Struct, frozen=True):
    """One row: what is done, what the breaker is told."""

    behaviour: Behaviour
    mark: Mark


FAULTS: dict[Fault, str] = {
    "connect": "no connection: refused, DNS, TLS, or the pool is full",
    "connect_timeout": "no connection in time",
    "head_timeout": "no response head in time",
    "stall": "no first content, or no further byte, in time",
    "total_timeout": "the attempt's whole time is over",
    "closed": "the connection ended before the response was complete",
    "protocol": "bytes that are no HTTP response",
    "garbage": "a body, content type or redirect that means nothing to us",
    "truncated": "a stream that ended without its end, or empty",
    "server": "408, 5xx other than 503 and 529, or such an error in the stream",
    "overloaded": "503 or 529, or such an error in the stream",
    "rate_limited": "429",
    "key_refused": "401, 402 or 403 of our key, or our quota is spent",
    "model_missing": "404 or 410 that names the candidate's model: the provider does not have it",
    "caller": "any other 4xx",
    "context_length": "the prompt is too long for the model",
    "content_policy": "the provider refuses the content",
    "unsupported": "the provider cannot do what the request asks (not sent)",
    "busy": "no place in the candidate's bulkhead (not sent)",
    "breaker_open": "the candidate's breaker is open (not sent)",
}

_EARLY = (Point.BEFORE_HEADERS, Point.BEFORE_CONTENT)
_HEAD, _CONTENT = (Point.BEFORE_HEADERS,), (Point.BEFORE_CONTENT,)

_ROWS: tuple[tuple[tuple[Point, ...], Behaviour, Mark, tuple[Fault, ...]], ...] = (
    # Cheap and often over at once: nothing was sent, a kept connection had been closed, one server of many failed.
    (_HEAD, Behaviour.RETRY, Mark.FAILURE, ("connect", "closed", "server")),
    # A 200 that comes to nothing has cost time, perhaps money: another candidate is the better second try.
    (_CONTENT, Behaviour.ELSEWHERE, Mark.FAILURE, ("connect", "closed", "server")),
    (_EARLY, Behaviour.ELSEWHERE, Mark.FAILURE, ("truncated", "garbage", "protocol", "connect_timeout")),
    # Asking again at once is what these ask not to do.
    (_EARLY, Behaviour.ELSEWHERE, Mark.FAILURE, ("overloaded",)),
    # Without a word of how long, one caller's large requests may be what is limited: no sign against the candidate.
    (_EARLY, Behaviour.ELSEWHERE, Mark.PAUSE, ("rate_limited",)),
    # The same wait again would spend the caller's patience.
    (_EARLY, Behaviour.NEXT, Mark.FAILURE, ("head_timeout", "stall")),
    (_EARLY, Behaviour.NEXT, Mark.KEY_REFUSED, ("key_refused",)),
    (_EARLY, Behaviour.NEXT, Mark.MISSING, ("model_missing",)),
    (_EARLY, Behaviour.NEXT, Mark.NOTHING, ("unsupported", "busy", "breaker_open")),
    (_EARLY, Behaviour.IF_CONFIGURED, Mark.HEALTHY, ("context_length", "content_policy")),
    (_EARLY, Behaviour.GIVE_UP, Mark.HEALTHY, ("caller",)),
    # The call's own time says nothing about a candidate that was asked late.
    (_EARLY, Behaviour.GIVE_UP, Mark.NOTHING, ("total_timeout",)),
    (
        (Point.AFTER_CONTENT,),
        Behaviour.CONTINUE,
        Mark.FAILURE,
        (
            *("connect", "connect_timeout", "head_timeout", "stall", "closed", "protocol", "garbage", "truncated"),
            *("server", "overloaded"),
        ),
    ),
    ((Point.AFTER_CONTENT,), Behaviour.CONTINUE, Mark.PAUSE, ("rate_limited",)),
    ((Point.AFTER_CONTENT,), Behaviour.CONTINUE, Mark.KEY_REFUSED, ("key_refused",)),
    ((Point.AFTER_CONTENT,), Behaviour.CONTINUE, Mark.MISSING, ("model_missing",)),
    ((Point.AFTER_CONTENT,), Behaviour.GIVE_UP, Mark.HEALTHY, ("caller", "context_length", "content_policy")),
    (
        (Point.AFTER_CONTENT,),
        Behaviour.GIVE_UP,
        Mark.NOTHING,
        ("total_timeout", "unsupported", "busy", "breaker_open"),
    ),
)

RULES: dict[tuple[Fault, Point], Rule] = {
    (fault, point): Rule(behaviour, mark)
    for points, behaviour, mark, faults in _ROWS
    for fault in faults
    for point in points
}
"""Every fault at every point."""


class RetryPolicy(msgspec.Struct, frozen=True):
    """A route's bounds. `retries` is per candidate, `attempts_max` over all of them; without content after `deadline_s`
    from the start no further attempt begins. A longer `Retry-After` than `retry_after_s_max` is not waited for."""

    retries: int = 1
    attempts_max: int = 6
    deadline_s: float = 120.0
    backoff_s: float = 0.25
    backoff_s_max: float = 4.0
    retry_after_s_max: float = 10.0
    falls_back_on: frozenset[Literal["context_length", "content_policy"]] = frozenset()
    continuation: bool = False


class Situation(msgspec.Struct):
    """Where the call stands: tries of this candidate and attempts in all (the failed one counted), candidates not yet
    tried, seconds since the start, and whether what was delivered can be continued (plain text of one choice)."""

    tries: int
    attempts: int
    others: int
    elapsed_s: float
    continuable: bool = False


class Decision(msgspec.Struct, frozen=True):
    """What to do, after how many seconds, and by which row."""

    action: Action
    delay_s: float
    rule: Rule


MISSING_CODES = frozenset(("model_not_found", "model_not_available", "deploymentnotfound", "resourcenotfoundexception"))
"""What providers call a model that they do not have, in small letters."""


def fault_of(failure: ProviderFailure, model: str) -> Fault:
    """A provider's failure as the table names it. A model that it does not have is our configuration's fault; a 404
    that does not speak of the candidate's `model` is about something in the request (a file), so the caller's."""
    if failure.kind == "caller" and failure.status in (404, 410):
        named = bool(model) and model.lower() in failure.message.lower()
        if named or (failure.code or "").lower() in MISSING_CODES:
            return "model_missing"
    return failure.kind


def decide(
    fault: Fault,
    point: Point,
    policy: RetryPolicy,
    situation: Situation,
    draw: float,
    retry_after_s: float | None = None,
) -> Decision:
    """The next step after a failed attempt. `draw`: a random number of [0, 1); `retry_after_s`: what the provider said.

    The same candidate is asked again only where the wait ends before the deadline.
    """
    rule = RULES[fault, point]
    behaviour = rule.behaviour
    late = situation.elapsed_s >= policy.deadline_s and point is not Point.AFTER_CONTENT
    if late or situation.attempts >= policy.attempts_max or not _allowed(behaviour, fault, policy, situation):
        return Decision(Action.GIVE_UP, 0.0, rule)
    again = behaviour is Behaviour.RETRY or (behaviour is Behaviour.ELSEWHERE and not situation.others)
    if again and situation.tries <= policy.retries:
        delay_s = backoff_s(policy, situation.tries, draw, retry_after_s)
        if delay_s is not None and situation.elapsed_s + delay_s < policy.deadline_s:
            return Decision(Action.RETRY, delay_s, rule)
    return Decision(Action.NEXT if situation.others else Action.GIVE_UP, 0.0, rule)


def backoff_s(policy: RetryPolicy, tries: int, draw: float, retry_after_s: float | None = None) -> float | None:
    """Seconds before try number `tries` + 1 of one candidate: full jitter, on top of a `Retry-After` so that not all
    who were sent away come back at once. None: the provider asked for more than the policy waits."""
    jitter_s = draw * min(policy.backoff_s_max, policy.backoff_s * 2.0 ** min(max(tries, 1) - 1, 64))
    if retry_after_s is None:
        return jitter_s
    return None if retry_after_s > policy.retry_after_s_max else retry_after_s + jitter_s


def _allowed(behaviour: Behaviour, fault: Fault, policy: RetryPolicy, situation: Situation) -> bool:
    if behaviour is Behaviour.IF_CONFIGURED:
        return fault in policy.falls_back_on
    if behaviour is Behaviour.CONTINUE:
        return policy.continuation and situation.continuable
    return behaviour is not Behaviour.GIVE_UP
