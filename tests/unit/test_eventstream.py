"""The splitter of AWS's event streams: AWS's own published messages, any cut, every kind of damage."""

from __future__ import annotations

import itertools
from struct import pack
from uuid import UUID
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.eventstream import DamagedStream, EventStreamSplitter, Message, MessageTooLarge
from tests.support.eventstream import event, message, raw_message, wire

MAX = 64 * 1024
TEXT_HEADER = bytes.fromhex("0c636f6e74656e742d747970650700106170706c69636174696f6e2f6a736f6e")

PUBLISHED = [
    ("000000100000000005c248eb7d98c8ff", {}, b""),
    ("00000017000000072986015804627974 6502ffc2f869dc", {"byte": -1}, b""),
    ("0000001900000009710e923e0573686f727403ffffb27cb6cc", {"short": -1}, b""),
    ("0000001d0000000d83e3f0e707696e746567657204ffffffff8b8e12eb", {"integer": -1}, b""),
    ("0000001e0000000e5d4adb8d046c6f6e6705ffffffffffffffff4bc232da", {"long": -1}, b""),
    ("0000001d00000000fd528c5a7b27666f6f273a27626172277dc3653936", {}, b"{'foo':'bar'}"),
    (
        f"0000003d0000002007fd8396{TEXT_HEADER.hex()}7b27666f6f273a27626172277d8d9c08b1",
        {"content-type": "application/json"},
        b"{'foo':'bar'}",
    ),
]
"""Messages of the test suite that AWS's SDKs share, as hex, with what is in them."""


def split(pieces: list[bytes], bytes_max: int = MAX) -> tuple[list[Message], str]:
    """The messages, and the name of what ended them."""
    splitter, found = EventStreamSplitter(bytes_max), []
    try:
        for piece in pieces:
            for each in splitter.feed(piece):
                found.append(each)
    except DamagedStream as damage:
        return found, type(damage).__name__
    return found, "unfinished" if splitter.unfinished else "whole"


@pytest.mark.parametrize(("raw", "headers", "payload"), PUBLISHED)
def test_published_messages_are_read(raw: str, headers: dict[str, object], payload: bytes) -> None:
    assert split([bytes.fromhex(raw)]) == ([Message(headers, payload)], "whole")  # type: ignore[arg-type]


def test_every_type_of_header_is_read() -> None:
    block = b"".join(
        pack(">B", len(name)) + name + value
        for name, value in (
            (b"yes", b"\x00"),
            (b"no", b"\x01"),
            (b"byte", b"\x02\x80"),
            (b"short", b"\x03\x01\x00"),
            (b"int", b"\x04\x00\x01\x00\x00"),
            (b"long", b"\x05" + pack(">q", -(2**40))),
            (b"bytes", b"\x06\x00\x02\xff\xfe"),
            (b"text", b"\x07\x00\x02" + "é".encode()),
            (b"time", b"\x08" + pack(">q", 1_700_000_000_123)),
            (b"uuid", b"\x09" + bytes(range(16))),
        )
    )
    assert split([raw_message(block, b"x")])[0][0].headers == {
        "yes": True,
        "no": False,
        "byte": -128,
        "short": 256,
        "int": 65536,
        "long": -(2**40),
        "bytes": b"\xff\xfe",
        "text": "é",
        "time": 1_700_000_000_123,
        "uuid": UUID(bytes=bytes(range(16))),
    }


def test_a_header_of_another_type_is_no_text() -> None:
    (only,), _ = split([raw_message(b"\x01a\x02\x01", b"")])
    assert (only.text("a"), only.text("b")) == ("", "")


@pytest.mark.parametrize("name", ["plain", "tools", "damaged", "cut", "not_a_stream", "huge"])
def test_a_byte_at_a_time_gives_the_same_messages(name: str) -> None:
    raw = wire(name)
    assert split([raw[i : i + 1] for i in range(len(raw))]) == split([raw])


@given(st.lists(st.integers(0, 1500), max_size=8))
def test_any_cut_gives_the_same_messages(cuts: list[int]) -> None:
    raw = wire("tools")
    places = sorted({min(cut, len(raw)) for cut in cuts} | {0, len(raw)})
    assert split([raw[a:b] for a, b in itertools.pairwise(places)]) == split([raw])


def test_messages_before_the_damage_are_told() -> None:
    found, end = split([event("a", b"1") + event("b", b"2")[:-1] + b"\x00" + event("c", b"3")])
    assert ([each.text(":event-type") for each in found], end) == (["a"], "DamagedStream")


@pytest.mark.parametrize("at", range(len(event("a", b"12"))))
def test_any_flipped_bit_is_noticed(at: int) -> None:
    raw = bytearray(event("a", b"12"))
    raw[at] ^= 0x10
    assert split([bytes(raw)])[1] == "DamagedStream"


@pytest.mark.parametrize(
    "block",
    [
        b"\x05ab",  # a name behind the end
        b"\x01a",  # no type
        b"\x01a\x0a",  # an unknown type
        b"\x01a\x04\x00",  # half a number
        b"\x01a\x09" + bytes(15),  # half a UUID
        b"\x01a\x07\x00",  # half a length
        b"\x01a\x07\x00\x05abcd",  # a text behind the end
        b"\x01a\x07\x00\x01\xff",  # no UTF-8
        b"\x01\xff\x00",  # a name in no UTF-8
        b"\x01a\x00\x01a\x00",  # the same name twice
    ],
)
def test_headers_that_cannot_be_read_are_damage(block: bytes) -> None:
    assert split([raw_message(block, b"x" * 20)])[1] == "DamagedStream"


def test_lengths_that_contradict_each_other_are_damage() -> None:
    for size, headers_size in ((15, 0), (16, 1), (0, 0), (40, 25), (40, 2**32 - 1)):
        prelude = pack(">II", size, headers_size)
        assert split([prelude + pack(">I", crc32(prelude)) + bytes(100)])[1] == "DamagedStream", (size, headers_size)


def test_the_bound_is_on_the_whole_message_and_known_from_the_prelude() -> None:
    raw = message({}, b"x" * 84)
    assert len(raw) == 100
    assert split([raw], 100)[1] == "whole"
    assert split([raw], 99) == ([], "MessageTooLarge")
    assert split([raw[:12]], 99) == ([], "MessageTooLarge")
    assert issubclass(MessageTooLarge, DamagedStream)


def test_what_is_no_event_stream_is_noticed_at_once() -> None:
    assert split([b'{"message":"'], MAX)[1] == "DamagedStream"


@settings(max_examples=200)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_nothing_else_than_damage_is_raised(raw: bytes, cuts: list[int]) -> None:
    places = sorted({min(cut, len(raw)) for cut in cuts} | {0, len(raw)})
    assert split([raw[a:b] for a, b in itertools.pairwise(places)]) == split([raw])


@settings(max_examples=200)
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_headers_of_any_bytes_are_read_or_damage(block: bytes, payload: bytes) -> None:
    found, end = split([raw_message(block, payload)])
    assert end == "DamagedStream" or (end == "whole" and found[0].payload == payload)
