"""The bytes of request bodies that a worker holds: a bound on their sum, and nothing left behind."""

from __future__ import annotations

import pytest

from proxy.bodies import Bodies, BodyShare
from proxy.errors import Overloaded


def test_shares_add_up_and_give_back_what_they_took_once() -> None:
    bodies = Bodies(100)
    first, second = BodyShare(bodies), BodyShare(bodies)
    first.grow(30)
    first.grow(10)
    second.grow(60)
    assert bodies.held == 100
    first.release()
    first.release()
    assert bodies.held == 60
    second.release()
    assert bodies.held == 0


def test_what_does_not_fit_is_refused_and_not_counted() -> None:
    bodies = Bodies(100)
    first, second = BodyShare(bodies), BodyShare(bodies)
    first.grow(60)
    second.grow(30)
    with pytest.raises(Overloaded) as refused:
        second.grow(11)
    assert refused.value.retry_after_ms
    assert (bodies.held, second.size) == (90, 30)
    second.release()
    assert bodies.held == 60


def test_an_announced_body_is_refused_before_it_comes_and_takes_no_place() -> None:
    bodies = Bodies(100)
    share = BodyShare(bodies)
    share.expect(100)
    assert bodies.held == 0
    BodyShare(bodies).grow(1)
    with pytest.raises(Overloaded):
        share.expect(100)
