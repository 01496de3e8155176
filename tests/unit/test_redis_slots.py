"""Which slot a key has, where a command's key stands, and what a cluster's answers say."""

from __future__ import annotations

from typing import Any

import pytest

from metering.keys import SHARDS
from storage.redis_connection import RedisReplyError
from storage.redis_slots import Place, key_of, read_redirect, read_slots, slot_of


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        ("123456789", 0x31C3),  # the check value in the specification's appendix on CRC16
        ("foo", 12182),
        ("{user1000}.following", 3443),
        ("foo{}{bar}", 8363),
        ("foo{{bar}}zap", 4015),
        ("foo{bar}{zap}", 5061),
        ("", 0),
    ],
)
def test_a_key_has_the_slot_that_the_specification_gives_it(key: str, slot: int) -> None:
    assert slot_of(key) == slot
    assert slot_of(key.encode()) == slot


def test_a_number_is_the_key_of_its_digits() -> None:
    assert slot_of(123456789) == slot_of("123456789")


def test_all_keys_of_a_shard_have_one_slot() -> None:
    for shard in SHARDS:
        keys = [shard.meta, shard.leases, shard.outbox, shard.mark, shard.account + "uid", shard.idempotency + "u:h"]
        assert {slot_of(key) for key in keys} == {slot_of(shard.meta)}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("GET", "k"), "k"),
        (("hget", "k", "f"), "k"),
        (("EVALSHA", "sha", 2, "k", "l", "a"), "k"),
        (("EVAL", "text", "1", "k"), "k"),
        (("EVAL", "text", 0), None),
        (("XREAD", "COUNT", 5, "STREAMS", b"k", "0-0"), b"k"),
        (("PING",), None),
        (("PUBLISH", "channel", "text"), None),
        (("SCRIPT", "LOAD", "text"), None),
    ],
)
def test_the_key_of_a_command_is_found(words: tuple[Any, ...], key: object) -> None:
    assert key_of(words) == key


@pytest.mark.parametrize("name", ["SCAN", "scan", "KEYS", "CONFIG", "FLUSHALL", "WAIT", "SUBSCRIBE", "NOSUCHCOMMAND"])
def test_a_command_for_one_server_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="for one server"):
        key_of((name,) if name == "NOSUCHCOMMAND" else (name, "0"))


def test_ranges_are_read_with_their_primaries_and_not_their_replicas() -> None:
    reply = [
        [0, 99, [b"10.0.0.1", 7001, b"id", []], [b"10.0.0.9", 7009, b"id"]],
        [100, 16_383, [None, 7002, b"id"]],
        [200, 201, [b"", 7003, b"id"]],
        [300, 300, [b"?", 7004, b"id"]],
        [400, 401, [b"::1", 7005, b"id"]],
    ]
    assert read_slots(reply, "asked") == [
        (0, 99, Place("10.0.0.1", 7001)),
        (100, 16_383, Place("asked", 7002)),
        (200, 201, Place("asked", 7003)),
        (300, 300, Place("asked", 7004)),
        (400, 401, Place("::1", 7005)),
    ]


@pytest.mark.parametrize(
    "reply", [None, 7, b"text", [7], [[0, 1]], [[0, 1, []]], [[5, 4, [b"h", 1]]], [[0, 16_384, [b"h", 1]]],
              [[0, 1, [b"h", 0]]], [[0, 1, [b"h", b"port"]]], [[0, 1, [7, 1]]]],
)  # fmt: skip
def test_a_map_that_cannot_be_read_is_a_value_error(reply: object) -> None:
    with pytest.raises(ValueError, match="CLUSTER SLOTS"):
        read_slots(reply, "asked")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("MOVED 3999 127.0.0.1:6381", Place("127.0.0.1", 6381)),
        ("ASK 3999 :6381", Place("asked", 6381)),
        ("MOVED 3999 2001:db8::1:6381", Place("2001:db8::1", 6381)),
    ],
)
def test_a_redirection_names_a_place(text: str, place: Place) -> None:
    assert read_redirect(RedisReplyError(text), "asked") == place


@pytest.mark.parametrize("text", ["MOVED", "MOVED 1", "MOVED 1 host:port", "MOVED 1 host:0", "MOVED 1 host:70000"])
def test_a_redirection_to_nowhere_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"redirection|port|literal"):
        read_redirect(RedisReplyError(text), "asked")
