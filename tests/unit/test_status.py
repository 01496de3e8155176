"""The one decision whether the outbox is over its bound, and the report that it is made from."""

from __future__ import annotations

import msgspec
import pytest

from config.settings import Metering
from metering.status import JournalReport, Outbox, Over, decode_report, over_bound

LIMITS = Metering(outbox_age_s_max=7_200, outbox_memory_percent_max=25)
AGE = 7_200_000


@pytest.mark.parametrize(
    ("age_ms", "percent", "already", "expected"),
    [
        (0, 0, False, None),
        (AGE, 24, False, None),
        (AGE + 1, 0, False, "journal_age"),
        (0, 25, False, "journal_memory"),
        (AGE + 1, 25, False, "journal_age"),
        (AGE * 9 // 10 + 1, 0, True, "journal_age"),
        (AGE * 9 // 10, 0, True, None),
        (AGE * 9 // 10 + 1, 0, False, None),
        (0, 23, True, "journal_memory"),
        (0, 22, True, None),
    ],
)
def test_the_outbox_is_over_at_a_bound_and_under_again_below_nine_tenths_of_both(
    age_ms: int, percent: int, already: bool, expected: Over | None
) -> None:
    assert over_bound(LIMITS, Outbox(age_ms, percent), already=already) == expected


def test_the_smallest_bounds_can_be_passed_and_left() -> None:
    least = Metering(outbox_age_s_max=0, outbox_memory_percent_max=1)
    assert over_bound(least, Outbox(1, 0), already=False) == "journal_age"
    assert over_bound(least, Outbox(0, 1), already=True) == "journal_memory"
    assert over_bound(least, Outbox(0, 0), already=True) is None


def test_a_report_is_read_as_it_was_written_and_anything_else_is_none() -> None:
    report = JournalReport(7, 1_200, 0, 1, 3, 2)
    assert decode_report(msgspec.json.encode(report)) == report
    assert decode_report(None) is None
    assert decode_report(b'{"entries_behind": 1}') is None
    assert decode_report(b"\x00") is None
