"""Outbox entries become rows whose postings sum to zero; what cannot be read is poison, what is opaque becomes null."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.journal_fields import Poison, month_of
from metering.journal_rows import (
    CONSUMPTION_COLUMNS,
    ENTRY_COLUMNS,
    SESSION_COLUMNS,
    Rows,
    entry_id,
    pairs,
    payload,
)

SID = "019a9f00-0000-7000-8000-00000000000a"
NOV_2026 = 1_795_000_000_000


def settle(**changed: bytes | None) -> dict[bytes, bytes]:
    fields: dict[bytes, bytes | None] = {
        b"t": b"settle", b"u": b"acc", b"ts": b"1795000000123", b"s": SID.encode(), b"k": b"KEY", b"o": b"completed",
        b"c": b"70", b"ab": b"5", b"d": b"0", b"sl": b"g1=50,g2=20", b"br": b"g1=3", b"st": b"1794999999000",
        b"pc": b"10", b"m": b"60", b"pv": b"v1", b"mt": b"{}",
    }  # fmt: skip
    fields |= {name.encode(): value for name, value in changed.items()}
    return {name: value for name, value in fields.items() if value is not None}


def grant(**changed: bytes | None) -> dict[bytes, bytes]:
    fields: dict[bytes, bytes | None] = {
        b"t": b"grant", b"u": b"acc", b"ts": b"1795000000000", b"g": b"g1", b"a": b"100", b"p": b"50", b"e": b"0",
        b"f": b"1795000000000", b"rp": b"0",
    }  # fmt: skip
    fields |= {name.encode(): value for name, value in changed.items()}
    return {name: value for name, value in fields.items() if value is not None}


def change(kind: bytes, **changed: bytes | None) -> dict[bytes, bytes]:
    """An entry of type expire, revoke or adjust."""
    fields: dict[bytes, bytes | None] = {b"t": kind, b"u": b"acc", b"ts": b"1795000000000", b"a": b"30"}
    fields |= {b"j": b"j1", b"sl": b"g1=10,g2=20"} if kind == b"adjust" else {b"g": b"g1"}
    fields |= {name.encode(): value for name, value in changed.items()}
    return {name: value for name, value in fields.items() if value is not None}


def converted(fields: dict[bytes, bytes]) -> Rows:
    rows = Rows()
    rows.add(7, 1, 42, fields)
    return rows


def ledgers(rows: Rows) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for *_, ledger, amount in rows.posting:
        sums[ledger] += amount
    return dict(sums)


def session_of(rows: Rows) -> dict[str, object]:
    return dict(zip(SESSION_COLUMNS, rows.session[0], strict=True))


def test_a_settlement_moves_consumption_absorption_and_breakage_in_double_entry() -> None:
    rows = converted(settle())
    assert ledgers(rows) == {
        "user:avail:g1": -53, "user:avail:g2": -20, "house:absorbed": -5, "earned": 75, "breakage": 3,
    }  # fmt: skip
    assert [row[3] for row in rows.posting] == list(range(len(rows.posting)))
    assert [dict(zip(CONSUMPTION_COLUMNS, row, strict=True)) for row in rows.consumption] == [
        {"shard": 7, "ep": 1, "n": 42, "grant_id": "g1", "amount": 50, "breakage": 3, "voided": 0},
        {"shard": 7, "ep": 1, "n": 42, "grant_id": "g2", "amount": 20, "breakage": 0, "voided": 0},
    ]
    assert dict(zip(ENTRY_COLUMNS, rows.entry[0], strict=True)) == {
        "shard": 7, "ep": 1, "n": 42, "type": "settle", "account_id": "acc", "sid": SID,
        "at": datetime(2026, 11, 18, 11, 6, 40, 123_000, tzinfo=UTC),
    }  # fmt: skip


def test_debt_added_by_a_settlement_is_earned_and_owed() -> None:
    rows = converted(settle(c=b"75", d=b"5"))
    assert ledgers(rows)["user:debt"] == -5
    assert ledgers(rows)["earned"] == 80


def test_debt_repaid_from_the_unused_hold_counts_as_consumption_but_is_not_charged() -> None:
    rows = converted(settle(rp=b"g2=8,g3=1"))
    assert ledgers(rows)["user:debt"] == 9
    assert ledgers(rows)["earned"] == 75
    assert {row[3]: row[4] for row in rows.consumption} == {"g1": 50, "g2": 28, "g3": 1}


def test_a_void_session_leaves_a_session_and_an_entry_and_no_postings() -> None:
    rows = converted(settle(o=b"void", c=b"0", ab=b"0", sl=b"", br=b"", mt=b""))
    assert (len(rows.session), len(rows.entry), rows.posting, rows.consumption) == (1, 1, [], [])


def test_a_grant_is_issued_to_the_user_and_confirmed() -> None:
    rows = converted(grant())
    assert ledgers(rows) == {"issuance": -100, "user:avail:g1": 100}
    assert (rows.confirmed, rows.consumption, rows.session) == ([("g1", 1, 42)], [], [])


def test_a_grant_that_repays_debt_is_partly_consumed() -> None:
    rows = converted(grant(rp=b"30"))
    assert ledgers(rows) == {"issuance": -100, "user:avail:g1": 70, "user:debt": 30}
    assert rows.consumption == [(7, 1, 42, "g1", 30, 0, 0)]


def test_what_a_settlement_gives_back_to_a_revoked_grant_is_voided() -> None:
    rows = converted(settle(vd=b"g2=8,g3=1"))
    assert ledgers(rows) == {
        "user:avail:g1": -53, "user:avail:g2": -28, "user:avail:g3": -1, "house:absorbed": -5, "earned": 75,
        "breakage": 3, "issuance": 9,
    }  # fmt: skip
    assert {row[3]: row[4:] for row in rows.consumption} == {"g1": (50, 3, 0), "g2": (20, 0, 8), "g3": (0, 0, 1)}


def test_what_expires_becomes_breakage() -> None:
    rows = converted(change(b"expire"))
    assert ledgers(rows) == {"user:avail:g1": -30, "breakage": 30}
    assert rows.consumption == [(7, 1, 42, "g1", 0, 30, 0)]
    assert dict(zip(ENTRY_COLUMNS, rows.entry[0], strict=True))["type"] == "expire"
    assert rows.confirmed == rows.revoked == rows.adjusted == []


def test_a_revocation_takes_the_rest_back_and_is_confirmed() -> None:
    rows = converted(change(b"revoke"))
    assert ledgers(rows) == {"user:avail:g1": -30, "issuance": 30}
    assert (rows.consumption, rows.revoked) == ([(7, 1, 42, "g1", 0, 0, 30)], [("g1", 1, 42)])


def test_an_adjustment_takes_from_its_grants_and_is_confirmed() -> None:
    rows = converted(change(b"adjust"))
    assert ledgers(rows) == {"user:avail:g1": -10, "user:avail:g2": -20, "issuance": 30}
    assert rows.consumption == [(7, 1, 42, "g1", 0, 0, 10), (7, 1, 42, "g2", 0, 0, 20)]
    assert rows.adjusted == [("j1", 1, 42)]


@pytest.mark.parametrize("fields", [change(b"revoke", a=b"0"), change(b"adjust", a=b"0", sl=b"")])
def test_a_change_that_found_nothing_is_confirmed_and_moves_nothing(fields: dict[bytes, bytes]) -> None:
    rows = converted(fields)
    assert (len(rows.entry), rows.posting, rows.consumption) == (1, [], [])
    assert rows.revoked + rows.adjusted in ([("g1", 1, 42)], [("j1", 1, 42)])


def test_metadata_fills_the_columns_that_it_names() -> None:
    said = {
        "route": "r", "provider": "p", "model": "m", "source": "provider", "stream": True, "prompt": 1, "cached": 2,
        "cache_write": 3, "output": 4, "reasoning": 5, "attempts": [{"status": None}],
    }  # fmt: skip
    row = session_of(converted(settle(mt=json.dumps(said).encode())))
    assert [row[name] for name in ("route", "provider", "model", "source", "stream")] == [
        "r",
        "p",
        "m",
        "provider",
        True,
    ]
    assert [row[f"{name}_tokens"] for name in ("prompt", "cached", "cache_write", "output", "reasoning")] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert json.loads(str(row["metadata"])) == said


@pytest.mark.parametrize(
    "metadata",
    [
        b"", b"{", b"\xff\xfe", b'{"route":"a\\u0000b"}', b'{"x":NaN}', b'{"x":1e999}', b"[" * 4000,
        b'{"x":"' + b"y" * 70_000 + b'"}',
    ],
    ids=["empty", "cut", "binary", "nul", "nan", "huge", "deep", "large"],
)  # fmt: skip
def test_a_session_lands_with_nulls_when_its_metadata_cannot_be_kept(metadata: bytes) -> None:
    row = session_of(converted(settle(mt=metadata)))
    assert row["charged"] == 70
    assert [row[name] for name in SESSION_COLUMNS[16:]] == [None] * 11


def test_values_of_the_wrong_kind_become_null_one_by_one() -> None:
    said = b'{"route":7,"model":"%s","stream":1,"prompt":true,"cached":-1,"output":1.5,"reasoning":1e30,"source":"x"}'
    row = session_of(converted(settle(mt=said % (b"m" * 201))))
    nulls = ("route", "model", "stream", "prompt_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
    assert [row[name] for name in nulls] == [None] * len(nulls)
    assert row["source"] == "x"


def test_json_that_is_no_object_is_kept() -> None:
    assert session_of(converted(settle(mt=b"[1]")))["metadata"] == "[1]"


@pytest.mark.parametrize(
    "fields",
    [
        {}, settle(t=b"refund"), settle(t=None), settle(c=None), settle(c=b"-70"), settle(c=b"7e1"), settle(c=b" 70"),
        settle(c=b"71"), settle(c=b"0"), settle(sl=b"g1=50"), settle(sl=b"g1=50,g1=20"), settle(sl=b"g1=70,"),
        settle(sl=b"g|1=70"), settle(sl=b"g1"), settle(br=b"g1=x"), settle(rp=b"=1"), settle(u=b""), settle(u=b"a b"),
        settle(u=b"a" * 65), settle(s=None), settle(k=None), settle(o=b"refunded"), settle(o=None),
        settle(ab=b"9007199254740992"), settle(d=b"-5"), settle(ts=b"253402300800000"), settle(st=b"now"),
        settle(pv=b"a b"), settle(pv=b"\x00"), grant(a=b"0"), grant(rp=b"101"), grant(g=b"g:1"), grant(ts=None),
        settle(vd=b"g1=x"), settle(vd=b"g1=1,g1=1"), change(b"expire", a=b"0"), change(b"expire", a=b"-1"),
        change(b"expire", g=None), change(b"revoke", a=None), change(b"revoke", g=b"g|1"), change(b"revoke", ts=None),
        change(b"revoke", u=b""), change(b"adjust", a=b"31"), change(b"adjust", sl=b"g1=10,g1=20"),
        change(b"adjust", j=None), change(b"adjust", j=b"a b"), change(b"adjust", sl=None),
    ],
)  # fmt: skip
def test_an_entry_whose_money_cannot_be_read_is_poison_and_adds_nothing(fields: dict[bytes, bytes]) -> None:
    rows = Rows()
    with pytest.raises(Poison):
        rows.add(7, 1, 42, fields)
    assert rows == Rows()


@given(st.dictionaries(st.sampled_from(sorted(settle())), st.binary(max_size=24), max_size=6))
def test_any_bytes_either_balance_or_are_poison(changed: dict[bytes, bytes]) -> None:
    rows = Rows()
    try:
        rows.add(1, 1, 1, settle() | changed)
    except Poison:
        assert rows == Rows()
    else:
        assert sum(row[5] for row in rows.posting) == 0


@given(
    spent=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 2**50)),
    broken=st.dictionaries(st.sampled_from(["a", "d"]), st.integers(1, 2**50)),
    repaid=st.dictionaries(st.sampled_from(["b", "e"]), st.integers(1, 2**50)),
    voided=st.dictionaries(st.sampled_from(["c", "f"]), st.integers(1, 2**50)),
    debt=st.integers(0, 2**50),
    absorbed=st.integers(0, 2**50),
)
def test_every_settlement_sums_to_zero_and_its_consumption_equals_its_postings(
    spent: dict[str, int],
    broken: dict[str, int],
    repaid: dict[str, int],
    voided: dict[str, int],
    debt: int,
    absorbed: int,
) -> None:
    def listed(parts: dict[str, int]) -> bytes:
        return ",".join(f"{gid}={amount}" for gid, amount in parts.items()).encode()

    charged = sum(spent.values()) + debt
    rows = converted(
        settle(
            sl=listed(spent), br=listed(broken), rp=listed(repaid), vd=listed(voided),
            c=b"%d" % charged, d=b"%d" % debt, ab=b"%d" % absorbed,
        )
    )  # fmt: skip
    assert sum(row[5] for row in rows.posting) == 0
    taken = {f"user:avail:{row[3]}": -sum(row[4:]) for row in rows.consumption}
    assert taken == {name: amount for name, amount in ledgers(rows).items() if name.startswith("user:avail:")}


def test_the_month_is_that_of_the_session_id_and_else_of_the_start() -> None:
    december = int(datetime(2026, 12, 1, tzinfo=UTC).timestamp() * 1000)
    digits = f"{december:012x}"
    sid = f"{digits[:8]}-{digits[8:]}-7000-8000-000000000000"
    assert month_of(sid, NOV_2026) == date(2026, 12, 1)
    before = f"{december - 1:012x}"
    assert month_of(f"{before[:8]}-{before[8:]}-7000-8000-000000000000", NOV_2026) == date(2026, 11, 1)
    for other in ("some-session", "ffffffff-ffff-7fff-bfff-ffffffffffff", "00000000-0000-7000-8000-000000000000"):
        assert month_of(other, NOV_2026) == date(2026, 11, 1)


def test_a_dead_entry_keeps_every_byte() -> None:
    kept = json.loads(payload([b"t", b"settle", b"\xff", b"a\x00b", b"t", b"twice"]))["fields"]
    assert kept[0:2] == ["t", "settle"]
    assert base64.b64decode(kept[2]["base64"]) == b"\xff"
    assert base64.b64decode(kept[3]["base64"]) == b"a\x00b"
    assert kept[4:] == ["t", "twice"]


def test_stream_words_are_read() -> None:
    assert entry_id(b"3-17") == (3, 17)
    assert pairs([b"a", b"1", b"b", b"2"]) == {b"a": b"1", b"b": b"2"}
    with pytest.raises(ValueError, match="argument"):
        pairs([b"a"])
