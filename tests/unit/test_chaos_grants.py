"""The rule that the chaos run holds expiring grants to: usable until the millisecond before, and not at it."""

from __future__ import annotations

from loadtests.chaos.grant_faults import Given, distances, payer

GIVEN = [Given("base", 0), Given("late", 2_000), Given("early", 1_000)]


def test_a_hold_takes_from_the_grant_that_ends_first_and_not_at_its_very_end() -> None:
    assert payer(GIVEN, 999) == "early"
    assert payer(GIVEN, 1_000) == "late"
    assert payer(GIVEN, 1_999) == "late"
    assert payer(GIVEN, 2_000) == payer(GIVEN, 5_000) == "base"


def test_holds_at_the_edges_of_an_expiry_are_counted() -> None:
    found = distances(GIVEN, [998, 999, 999, 1_000, 1_001, 1_002, 2_001, 0, 1])
    assert found == {"1 ms before an expiry": 2, "at the millisecond of an expiry": 1, "1 ms after an expiry": 2}
