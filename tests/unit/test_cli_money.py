"""Credits on the command line are exact in both directions, and what is no amount is refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli.money import MICROS_MAX, InvalidCredits, format_credits, parse_change, parse_credits
from metering.ledger import MICROS_MAX as LEDGER_MICROS_MAX


@given(st.integers(1, MICROS_MAX))
def test_every_amount_survives_the_way_out_and_back(micros: int) -> None:
    assert parse_credits(format_credits(micros)) == micros


@pytest.mark.parametrize(
    ("text", "micros"),
    [("1", 1_000_000), ("12.5", 12_500_000), ("0.000001", 1), ("007", 7_000_000), ("0.1", 100_000),
     ("9007199254.740991", MICROS_MAX), ("0.300000", 300_000)],
)  # fmt: skip
def test_decimals_become_micros_without_rounding(text: str, micros: int) -> None:
    assert parse_credits(text) == micros


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.000000", "-1", "-0.5", "NaN", "nan", "inf", "-Infinity", "1e3", "1E-3", "1_000", "1,5", "1.", ".5",
     "0.0000001", "1.1234567", "9007199254.740992", "9" * 400, "\u0661\u0662", "\uff11", " 1", "1 ", "+1", "0x10",
     "1\n", "1\0", "--1"],
)  # fmt: skip
def test_what_is_no_positive_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidCredits):
        parse_credits(text)


@given(st.text(max_size=30))
def test_any_text_is_an_amount_in_range_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidCredits):
        assert 0 < parse_credits(text) <= MICROS_MAX


@given(st.integers(-MICROS_MAX, MICROS_MAX).filter(bool))
def test_every_change_survives_the_way_out_and_back(micros: int) -> None:
    assert parse_change(format_credits(micros)) == micros


@pytest.mark.parametrize(
    ("text", "micros"), [("-5", -5_000_000), ("+5", 5_000_000), ("-0.000001", -1), ("2.5", 2_500_000)]
)
def test_a_change_may_have_a_sign(text: str, micros: int) -> None:
    assert parse_change(text) == micros


@pytest.mark.parametrize(
    "text", ["", "-", "+", "-0", "0", "--5", "+-5", "-+5", "- 5", "-1e3", "-NaN", "-9007199254.740992"]
)
def test_what_is_no_change_is_refused(text: str) -> None:
    with pytest.raises(InvalidCredits):
        parse_change(text)


@pytest.mark.parametrize(
    ("micros", "text"),
    [(0, "0.00"), (1, "0.000001"), (12_500_000, "12.50"), (-1_500_000, "-1.50"), (1_234_567, "1.234567")],
)
def test_amounts_show_two_to_six_decimals(micros: int, text: str) -> None:
    assert format_credits(micros) == text


def test_the_bound_is_the_ledger_s() -> None:
    assert MICROS_MAX == LEDGER_MICROS_MAX
