"""Splicing a JSON body: one member changes, every other byte stays."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.json_root import (
    CHUNK_BYTES,
    ROOT_MEMBERS_MAX,
    NotAnObject,
    RootObject,
    depth_exceeds,
    skipped,
    value_end,
)

MIB = 1024 * 1024

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


def test_members_are_replaced_where_they_stand_in_whatever_order_they_are_named() -> None:
    assert RootObject(b'{"a":1,"b":2}').replaced({"c": b"5", "b": b"4", "a": b"3"}) == b'{"a":3,"b":4,"c":5}'


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
    st.sampled_from([None, None, 1, 3]),
    st.sampled_from([(",", ":"), (", ", ": "), (",", ": "), (" ,", " :")]),
    st.booleans(),
    st.text(max_size=3),
)
def test_any_object_reads_and_splices_like_json(
    value: dict[str, object], indent: int | None, separators: tuple[str, str], ascii_only: bool, new: str
) -> None:
    written = json.dumps(value, indent=indent, separators=separators, ensure_ascii=ascii_only)
    body = written.encode("utf-8", "surrogatepass")
    try:
        body.decode()
    except UnicodeDecodeError:
        return  # lone surrogates are not JSON text
    root = RootObject(body)
    assert {name: json.loads(root.raw(name) or b"") for name in root.spans} == value
    assert json.loads(root.replaced({new: b"[7]"})) == {**value, new: [7]}


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"b":[2, 3]}',
        b'{"a": 1, "b": [2,3]}',
        b'{"a": 1,"b":[2,3]}',
        b'{"a":1, "b":[2,3]}',
        b'\n{\n  "a": 1,\n  "b": [2]\n}\n',
        b'{"\xc3\xa9":1,"b":2}',
        b'{"\xc3\xa9": 1, "b": 2}',
        b'{"\\"":1,"b":2}',
        b'{"\\"": 1, "b": 2}',
        b'{"\\u0061": 1, "b": 2}',
        b'{"":1}',
    ],
)
def test_spans_are_those_of_the_values_however_the_members_are_written(body: bytes) -> None:
    root = RootObject(body)
    assert {name: json.loads(root.raw(name) or b"") for name in root.spans} == json.loads(body)
    assert all(body[start:end].strip() == body[start:end] for start, end in root.spans.values())


@pytest.mark.parametrize(("depth", "exceeds"), [(127, False), (128, False), (129, True)])
def test_depth_is_counted_exactly_at_the_bound(depth: int, exceeds: bool) -> None:
    noise = b'"[[[{{{\\"]",' * 200
    inner = b"[" * (depth - 1) + b"]" * (depth - 1)
    assert depth_exceeds(b"[" + noise + inner + b"]", 128) is exceeds
    assert depth_exceeds(b"[" * depth + b"]" * depth, 128) is exceeds


def test_many_shallow_brackets_are_not_deep() -> None:
    assert not depth_exceeds(b"[" + b"{}," * 100_000 + b"{}]", 128)


# -- Hostile bodies: linear work, small memory ------------------------------------------------------------------------


TAIL = b"[]," * 200 + b"0]}"
"""So many brackets that the depth has to be looked at to the end."""


def doubles(size: int) -> bytes:
    """Many doubled members before a value of `size` bytes."""
    return b"{" + b",".join(b'"a":%d' % at for at in range(900)) + b',"b":[' + b"1," * (size // 2) + TAIL


def members(size: int) -> bytes:
    return b"{" + b",".join(b'"%d":1' % at for at in range(size // 10)) + b"}"


def escapes(size: int) -> bytes:
    return b'{"b":"' + b"\\n" * (size // 2) + b'","a":[' + TAIL


def quotes(size: int) -> bytes:
    return b'{"a":[' + b'"",  ' * (size // 5) + TAIL


def brackets(size: int) -> bytes:
    return b'{"a":[' + b"[]," * (size // 3) + TAIL


def peak(act: Callable[[], object]) -> int:
    """Bytes that `act` allocates at its highest."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read(body: bytes) -> None:
    depth_exceeds(body, 128)
    try:
        RootObject(body)
    except NotAnObject as error:
        assert "members" in str(error)  # noqa: PT017


@pytest.mark.parametrize("make", [doubles, members, escapes, quotes, brackets])
def test_a_hostile_body_takes_little_memory_and_time(make: Callable[[int], bytes]) -> None:
    body = make(8 * MIB)
    began = process_time()
    read(body)
    assert process_time() - began < 2  # quadratic or byte by byte it takes ten times as long
    assert peak(lambda: read(body)) < 4 * MIB  # no copy of the body, no object for each of its parts


@pytest.mark.parametrize("make", [doubles, escapes, quotes])
def test_memory_does_not_grow_with_the_body(make: Callable[[int], bytes]) -> None:
    small, large = make(MIB), make(8 * MIB)
    assert peak(lambda: read(large)) < 2 * peak(lambda: read(small)) + MIB


def test_members_are_bounded_doubles_included() -> None:
    for names in (range(ROOT_MEMBERS_MAX + 1), [7] * (ROOT_MEMBERS_MAX + 1)):
        parts = [b'"%d":0' % name for name in names]
        assert RootObject(b"{" + b",".join(parts[1:]) + b"}").spans
        with pytest.raises(NotAnObject, match="more than 1000 members"):
            RootObject(b"{" + b",".join(parts) + b"}")
    assert len(RootObject(b'{"a":1,"b":2}', 2).spans) == 2
    with pytest.raises(NotAnObject):
        RootObject(b'{"a":1,"b":2}', 1)


@given(VALUES, st.sampled_from([b",", b" ,", b"\n}", b"}"]), st.booleans())
def test_the_parser_and_the_skipper_find_the_same_end(value: object, after: bytes, ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace")
    body = b"[" + raw + after
    assert value_end(body, memoryview(body), 1) == 1 + len(raw)
    if raw[:1] in b'"[{':
        assert skipped(body, 1) == 1 + len(raw)


@pytest.mark.parametrize("shift", range(-3, 4))
@pytest.mark.parametrize("tail", [b"\\\\", b'\\"', b'\\\\\\"', b"\xc3\xa9", b"]"])
def test_what_falls_on_the_edge_of_a_chunk_is_read_right(shift: int, tail: bytes) -> None:
    start = b'{"a":"'
    body = start + b"x" * (CHUNK_BYTES - len(start) + shift) + tail + b'[[[","b":[[]]}'
    assert not depth_exceeds(body, 3)
    assert depth_exceeds(body, 2)
    assert set(RootObject(body).spans) == {"a", "b"}
    with pytest.raises(NotAnObject):
        RootObject(body.replace(b"[[[", b"\xff"))


@pytest.mark.parametrize("body", [b'{"\\q":1}', b'{"\\ud800":1}', b'{"a\n":1}', b'{"a":1', b'{"a" 1}', b"{,}"])
def test_a_broken_member_is_refused(body: bytes) -> None:
    with pytest.raises(NotAnObject):
        RootObject(body)
