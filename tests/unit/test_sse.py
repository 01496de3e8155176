"""The SSE splitter: the grammar of WHATWG HTML 9.2.6 on bytes, in whatever pieces they come."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.sse import FrameTooLarge, SseSplitter


def frames(*pieces: bytes, frame_bytes_max: int = 1000) -> list[tuple[bytes, bytes]]:
    splitter = SseSplitter(frame_bytes_max)
    found = [frame for piece in pieces for frame in splitter.feed(piece)]
    return found + splitter.end()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_each_line_ending_ends_a_frame_at_once(end: bytes) -> None:
    splitter = SseSplitter(1000)
    assert splitter.feed(b"data: a" + end + end) == [(b"", b"a")]
    assert splitter.feed(b"data: b" + end + end) == [(b"", b"b")]


def test_unicode_line_separators_inside_json_do_not_split() -> None:
    payload = '{"a":"x\u2028y\u0085z"}'.encode()
    assert frames(b"data: " + payload + b"\n\n") == [(b"", payload)]


def test_comments_ids_and_retries_are_dropped() -> None:
    assert frames(b": hello\n\nid: 7\nretry: 10\n\ndata: a\nid: 9\n\n") == [(b"", b"a")]


def test_an_event_without_data_is_no_frame() -> None:
    assert frames(b"event: ping\n\ndata: a\n\n") == [(b"", b"a")]


def test_the_event_name_and_data_without_a_blank_are_read() -> None:
    assert frames(b"event: error\ndata:{}\n\n") == [(b"error", b"{}")]


def test_data_lines_of_one_frame_are_joined() -> None:
    assert frames(b"data: a\ndata: b\n\n") == [(b"", b"a\nb")]


def test_a_byte_order_mark_is_skipped_even_when_cut() -> None:
    assert frames(b"\xef", b"\xbb\xbfdata: a\n\n") == [(b"", b"a")]


def test_a_last_frame_without_its_blank_line_counts_at_the_end() -> None:
    assert frames(b"data: a\n\ndata: [DONE]\n") == [(b"", b"a"), (b"", b"[DONE]")]


@pytest.mark.parametrize("shape", [b"data: %b\n\n", b"data: %b", b"event: x\ndata: %b\n\n"])
def test_a_frame_above_the_bound_raises(shape: bytes) -> None:
    with pytest.raises(FrameTooLarge):
        frames(shape % (b"x" * 1001))


WIRE = st.lists(
    st.sampled_from(
        [
            b"data: a",
            b"data:b",
            b"event: e",
            b": c",
            b"id: 1",
            b"\n",
            b"\r\n",
            b"\r",
            b"\n\n",
            b"\r\n\r\n",
            b"data: \xe2\x80\xa8",
        ]
    ),
    max_size=20,
).map(b"".join)


@given(WIRE, st.lists(st.integers(0, 200), max_size=8))
def test_cuts_change_nothing(wire: bytes, cuts: list[int]) -> None:
    places = sorted({min(cut, len(wire)) for cut in cuts} | {0, len(wire)})
    pieces = [wire[a:b] for a, b in itertools.pairwise(places)]
    assert frames(*pieces) == frames(wire) == frames(*[wire[i : i + 1] for i in range(len(wire))])


@given(
    st.lists(
        st.sampled_from(
            [b"data: a\n\n", b"data: \n\n", b"data: a\r\n\r\n", b"data:b\n\n", b": c\n\n", b"data: a\nx", b"\n"]
        )
    )
)
def test_a_read_that_brings_one_frame_gives_what_its_bytes_give(pieces: list[bytes]) -> None:
    wire = b"".join(pieces)
    assert frames(*pieces) == frames(*[wire[i : i + 1] for i in range(len(wire))])


@pytest.mark.parametrize("started", [b"", b"data: x\n\n"])
def test_the_bound_is_the_same_for_a_frame_that_comes_alone(started: bytes) -> None:
    assert frames(started, b"data: 12345\n\n", frame_bytes_max=5)[-1:] == [(b"", b"12345")]
    with pytest.raises(FrameTooLarge):
        frames(started, b"data: 123456\n\n", frame_bytes_max=5)
