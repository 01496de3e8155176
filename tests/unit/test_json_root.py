"""Splicing a JSON body: one member changes, every other byte stays."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.json_root import NotAnObject, RootObject, depth_exceeds

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def test_a_replaced_member_leaves_every_other_byte() -> None:
    body = b' { "model" : "a" , "x":[1, {"y": "}"}],\n"z":"q\\"}"}  '
    assert RootObject(body).replaced({"model": b'"b"'}) == body.replace(b'"a"', b'"b"')


def test_a_missing_member_is_added() -> None:
    assert RootObject(b"{}").replaced({"a": b"1"}) == b'{"a":1}'
    assert RootObject(b'{"b":2}').replaced({"a": b"1"}) == b'{"b":2,"a":1}'


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":2}',
        b'{"a":{"a":1},"a":2}',
        b'{"a":1,"a":12}',
        b'{"a":12,"a":1}',
        b'{"a":"x","b":1,"\\u0061":"y"}',
        b'{"a":[1,2,{"k":"]"}],"c":"\xc3\xa9","a":"x"}',
    ],
)
def test_doubled_members_are_seen(body: bytes) -> None:
    assert RootObject(body).duplicates == {"a"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1}x',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":"\xff"}',
        b'{"a":01}',
        b"{'a':1}",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(NotAnObject):
        RootObject(body)


@given(
    st.dictionaries(st.text(max_size=6), VALUES, max_size=5),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.text(max_size=3),
)
def test_any_object_reads_and_splices_like_json(
    value: dict[str, object], indent: int | None, ascii_only: bool, new: str
) -> None:
    body = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        body.decode()
    except UnicodeDecodeError:
        return  # lone surrogates are not JSON text
    root = RootObject(body)
    assert {name: json.loads(root.raw(name) or b"") for name in root.spans} == value
    assert json.loads(root.replaced({new: b"[7]"})) == {**value, new: [7]}


@pytest.mark.parametrize(("depth", "exceeds"), [(127, False), (128, False), (129, True)])
def test_depth_is_counted_exactly_at_the_bound(depth: int, exceeds: bool) -> None:
    noise = b'"[[[{{{\\"]",' * 200
    inner = b"[" * (depth - 1) + b"]" * (depth - 1)
    assert depth_exceeds(b"[" + noise + inner + b"]", 128) is exceeds
    assert depth_exceeds(b"[" * depth + b"]" * depth, 128) is exceeds


def test_many_shallow_brackets_are_not_deep() -> None:
    assert not depth_exceeds(b"[" + b"{}," * 100_000 + b"{}]", 128)
