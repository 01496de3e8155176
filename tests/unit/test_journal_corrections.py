"""A policy is an entry without postings; a correction moves consumption, debt and absorption that sum to zero."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from metering.journal_corrections import CORRECTION_COLUMNS
from metering.journal_fields import Poison
from metering.journal_rows import ENTRY_COLUMNS, Rows

SID = "019a9f00-0000-7000-8000-00000000000a"
AT = datetime(2026, 11, 18, 11, 6, 40, 123_000, tzinfo=UTC)


def policy(**changed: bytes) -> dict[bytes, bytes]:
    fields = {b"t": b"policy", b"u": b"acc", b"ts": b"1795000000123", b"pl": b"grace", b"a": b"70", b"r": b"3"}
    return fields | {name.encode(): value for name, value in changed.items()}


def correct(**changed: bytes) -> dict[bytes, bytes]:
    fields = {
        b"t": b"correct", b"u": b"acc", b"ts": b"1795000000123", b"s": SID.encode(), b"k": b"KEY", b"c": b"70",
        b"ab": b"5", b"d": b"10", b"sl": b"g1=50,g2=10", b"mt": b'{"route":"r","output":9}',
    }  # fmt: skip
    return fields | {name.encode(): value for name, value in changed.items()}


def added(fields: dict[bytes, bytes]) -> Rows:
    rows = Rows()
    rows.add(7, 1, 4, fields)
    return rows


def test_a_policy_is_confirmed_and_moves_nothing() -> None:
    rows = added(policy())
    assert dict(zip(ENTRY_COLUMNS, rows.entry[0], strict=True)) == {
        "shard": 7, "ep": 1, "n": 4, "type": "policy", "account_id": "acc", "sid": None, "at": AT,
    }  # fmt: skip
    assert rows.policies == [("acc", 3)]
    assert rows.posting == rows.consumption == rows.session == rows.correction == []


def test_a_correction_moves_consumption_debt_and_absorption_in_double_entry() -> None:
    rows = added(correct())
    assert [row[4:] for row in rows.posting] == [
        ("user:avail:g1", -50), ("user:avail:g2", -10), ("user:debt", -10), ("house:absorbed", -5), ("earned", 75),
    ]  # fmt: skip
    assert sum(row[5] for row in rows.posting) == 0
    assert [row[3:] for row in rows.consumption] == [("g1", 50, 0, 0), ("g2", 10, 0, 0)]
    assert rows.entry == [(7, 1, 4, "correct", "acc", SID, AT)]
    assert rows.session == []
    (row,) = rows.correction
    told = dict(zip(CORRECTION_COLUMNS, row, strict=True))
    assert (told["month"], told["sid"], told["account_id"], told["key_id"]) == (date(2025, 11, 1), SID, "acc", "KEY")
    assert (told["charged"], told["absorbed"], told["debt"], told["at"]) == (70, 5, 10, AT)
    assert (told["route"], told["output_tokens"]) == ("r", 9)


@pytest.mark.parametrize(
    "fields",
    [
        policy(pl=b"other"), policy(pl=b""), policy(pl=b"cutoff"), policy(a=b"-1"), policy(r=b"x"), policy(u=b"a|b"),
        correct(c=b"71"), correct(d=b"9"), correct(sl=b"g1=50"), correct(ab=b"1e3"), correct(s=b""), correct(u=b""),
        correct(ts=b"9" * 16),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_poison_and_adds_nothing(fields: dict[bytes, bytes]) -> None:
    rows = Rows()
    with pytest.raises(Poison):
        rows.add(7, 1, 4, fields)
    assert rows == Rows()


def test_a_correction_without_readable_metadata_is_kept() -> None:
    assert added(correct(mt=b"{nonsense")).correction[0][-1] is None
