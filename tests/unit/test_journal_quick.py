"""The short way from an entry to rows answers what the long way answers, or that it does not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.journal_fields import Poison
from metering.journal_quick import NAMES, settle_quickly
from metering.journal_rows import Rows, pairs

SID = b"019a9f00-0000-7000-8000-00000000000a"
USUAL: dict[bytes, bytes] = {
    b"t": b"settle", b"u": b"acc", b"ts": b"1795000000123", b"s": SID, b"k": b"KEY", b"o": b"completed", b"c": b"70",
    b"ab": b"5", b"d": b"0", b"sl": b"g1=50,g2=20", b"br": b"", b"st": b"1794999999000", b"pc": b"10", b"m": b"60",
    b"pv": b"v1", b"mt": b'{"route":"r","model":"m","stream":true,"prompt":3,"output":4}',
}  # fmt: skip
SOME: dict[bytes, list[bytes]] = {
    b"t": [b"settle", b"grant"],
    b"o": [b"completed", b"void", b"swept", b"refunded"],
    b"c": [b"70", b"0", b"75", b"007", b"-70", b"9007199254740992", b"", b"\xc2\xb2"],
    b"d": [b"0", b"5", b"x"],
    b"ab": [b"0", b"9007199254740991", b"9007199254740992"],
    b"m": [b"60", b"0000000000000000060", b"99999999999999999999"],
    b"sl": [b"g1=70", b"g1=50,g2=20", b"", b"g1=0,g2=70", b"g1=70,", b"g1=35,g1=35", b"g|=70", b"g1"],
    b"br": [b"", b"g1=3"],
    b"s": [SID, b"some-session", b"ffffffff-ffff-7fff-bfff-ffffffffffff", b"019A9F00-0000-7000-8000-00000000000a"],
    b"ts": [b"1795000000123", b"1", b"253402300800000", b"179500000012x"],
    b"pv": [b"v1", b"", b"a.b", b"a b"],
    b"u": [b"acc", b"", b"a b", b"a" * 65],
    b"mt": [USUAL[b"mt"], b"", b"{", b"[1]", b'{"route":7,"stream":1,"prompt":true,"output":-1}'],
}


def flat(fields: dict[bytes, bytes]) -> list[bytes]:
    return [word for pair in fields.items() for word in pair]


def both(words: list[bytes]) -> tuple[Rows | None, Rows | None]:
    """What the short way and the long way made of an entry; None where it refused it."""
    quick, slow = Rows(), Rows()
    done = settle_quickly(quick, 7, 1, 42, words)
    if not done:
        assert quick == Rows()
    try:
        slow.add(7, 1, 42, pairs(words))
    except Poison:
        return (quick if done else None), None
    return (quick if done else None), slow


@pytest.mark.parametrize(
    "changed",
    [
        {}, {b"sl": b"g1=70"}, {b"sl": b"", b"c": b"0", b"ab": b"0", b"o": b"void"}, {b"c": b"75", b"d": b"5"},
        {b"sl": b"g1=0,g2=70"}, {b"mt": b""}, {b"mt": b"{"}, {b"o": b"swept", b"ab": b"0"},
    ],
)  # fmt: skip
def test_a_usual_settlement_goes_the_short_way_to_the_same_rows(changed: dict[bytes, bytes]) -> None:
    quick, slow = both(flat(USUAL | changed))
    assert quick is not None
    assert quick == slow


@pytest.mark.parametrize("added", [{b"rp": b"g1=1"}, {b"vd": b"g1=1"}, {b"br": b"g1=1"}, {b"hl": b"1"}])
def test_what_is_rare_goes_the_long_way(added: dict[bytes, bytes]) -> None:
    assert both(flat(USUAL | added))[0] is None


@pytest.mark.parametrize("name", [b"ab", b"pc", b"m"])
def test_an_amount_beyond_the_bound_is_left_to_the_long_way_that_refuses_it(name: bytes) -> None:
    assert both(flat(USUAL | {name: b"9007199254740992"})) == (None, None)


def test_fields_in_another_order_go_the_long_way() -> None:
    shuffled = list(USUAL.items())
    random.Random(1).shuffle(shuffled)
    assert both(flat(dict(shuffled)))[0] is None
    assert list(USUAL) == NAMES


@given(
    st.fixed_dictionaries(
        {}, optional={name: st.one_of(st.sampled_from(known), st.binary(max_size=20)) for name, known in SOME.items()}
    )
)
def test_the_short_way_never_differs_from_the_long_one(changed: dict[bytes, bytes]) -> None:
    quick, slow = both(flat(USUAL | changed))
    assert quick is None or quick == slow
