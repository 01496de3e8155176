"""The response cache's pure parts: the name of an answer, its stored form, and what the configuration may say."""

from __future__ import annotations

import copy
import json
import random
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from config import response_cache as config
from config import settings
from metering.ledger import AccountRef, Gone, SessionRef
from metering.pricing import TokenUsage
from proxy.live_session import Cached, LiveSession
from proxy.response_cache_entry import Kept, Recording, Room, marked, pack, stripped, unpack
from proxy.response_cache_key import NOT_IN_KEY, answer_name, canonical
from proxy.session import Ending
from proxy.settlement import bill, corrects

BODY: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief. \u00e9\u2028"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a \"b\" \\ c"}, {"type": "image_url", "image_url": {"url": "x"}}],
        },
    ],
    "temperature": 0.5,
    "n": 2,
    "seed": 2**70,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [True, None, -0.0]}}}],
    "stop": ["x", "y"],
}  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(max_size=8), VALUES, min_size=1, max_size=6)


def name(
    body: bytes, *, scope: str = "a1", salt: bytes = b"s", hints: tuple[bytes, ...] = (), stream: bool = False
) -> Any:
    return answer_name(scope, salt, hints, body, stream=stream)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def shuffled(value: Any, dice: random.Random) -> Any:
    """The same with members in another order, all the way down."""
    if isinstance(value, dict):
        pairs = [(key, shuffled(each, dice)) for key, each in value.items()]
        dice.shuffle(pairs)
        return dict(pairs)
    if isinstance(value, list):
        return [shuffled(each, dice) for each in value]
    return value


@given(BODIES, st.randoms(use_true_random=False), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_neither_the_order_of_members_nor_blanks_nor_escapes_matter(
    body: dict[str, Any], dice: random.Random, ascii_only: bool, indent: Any
) -> None:
    other = shuffled(body, dice)
    assert canonical(encoded(body)) == canonical(
        b" \n" + json.dumps(other, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass") + b"\t"
    ) or not _utf8(other)


def _utf8(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@given(BODIES, BODIES)
def test_any_other_member_or_value_matters(one: dict[str, Any], two: dict[str, Any]) -> None:
    kept = [{key: value for key, value in body.items() if key not in NOT_IN_KEY} for body in (one, two)]
    assume(not _same(*kept))
    assert name(encoded(one)) != name(encoded(two))


def _same(one: Any, two: Any) -> bool:
    """Equal, where 1, 1.0 and true are three things."""
    return repr(_sorted(one)) == repr(_sorted(two))


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((key, _sorted(each)) for key, each in value.items())
    return [_sorted(each) for each in value] if isinstance(value, list) else value


def changes() -> list[tuple[str, dict[str, Any]]]:
    """The body with one thing changed."""
    found = []

    def add(about: str, change: Any) -> None:
        body = copy.deepcopy(BODY)
        change(body)
        found.append((about, body))

    add("another word", lambda body: body["messages"][1]["content"][0].update(text="a"))
    add("another order of messages", lambda body: body["messages"].reverse())
    add("another role", lambda body: body["messages"][0].update(role="developer"))
    add("another image", lambda body: body["messages"][1]["content"][1]["image_url"].update(url="y"))
    add("a deep member of a tool", lambda body: body["tools"][0]["function"]["parameters"].update(b=2))
    add("a number as a fraction", lambda body: body.update(n=2.0))
    add("a huge seed", lambda body: body.update(seed=2**70 + 1))
    add("another order of stops", lambda body: body["stop"].reverse())
    add("a member that is null", lambda body: body.update(logprobs=None))
    add("a member nobody knows", lambda body: body.update(whatever=1))
    add("what a stream shall carry", lambda body: body.update(stream_options={"include_usage": True}))
    add("the service tier", lambda body: body.update(service_tier="flex"))
    return found


@pytest.mark.parametrize(("about", "body"), changes(), ids=[about for about, _ in changes()])
def test_what_may_change_the_answer_changes_its_name(about: str, body: dict[str, Any]) -> None:
    assert name(encoded(body)) != name(encoded(BODY)), about


@pytest.mark.parametrize("member", sorted(NOT_IN_KEY))
def test_bookkeeping_does_not_change_the_name_at_the_root_and_does_below(member: str) -> None:
    assert name(encoded(BODY | {member: "x"})) == name(encoded(BODY))
    below = copy.deepcopy(BODY)
    below["messages"][0][member] = "x"
    assert name(encoded(below)) != name(encoded(BODY))


def test_account_route_hints_and_form_are_part_of_the_name() -> None:
    body = encoded(BODY)
    names = [
        name(body), name(body, scope="a2"), name(body, scope=""), name(body, salt=b"t"), name(body, hints=(b"one",)),
        name(body, hints=(b"one", b"two")), name(body, hints=(b"onetwo",)), name(body, stream=True),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert all(len(each) == 64 and set(each) <= set("0123456789abcdef") for each in names)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":2}',
        b'{"messages":[{"role":"user","content":"one","content":"two"}]}',
        b'{"a":1e400}',
        b'{"a":NaN}',
        b'{"a":%b}' % (b"1" * 5_000),
        b"[1]",
        b'{"a":',
        b'{"a":"\xff"}',
        b'{"a":%b1%b}' % (b"[" * 100_000, b"]" * 100_000),
    ],
)
def test_a_body_that_two_readers_may_read_differently_has_no_name(body: bytes) -> None:
    assert name(body) is None


KEPT = Kept(
    payloads=[b'{"a":1}', b'{"b":2}'],
    last=b'{"usage":null,"x_tollgate":{}}',
    usage=b'{"prompt_tokens":3}',
    tokens=TokenUsage(3, 3, 0, 4, 1),
    micros=7,
    stored_ms=5_000,
)


def test_an_answer_comes_back_as_it_was_packed_and_damage_is_none() -> None:
    packed = pack(KEPT)
    assert unpack(packed, 10_000) == KEPT
    assert unpack(packed, 10) is None
    for damaged in (
        b"",
        packed[:3],
        packed[:-5],
        packed[:4] + b"y" + packed[5:],
        b"\0\0\0\1" + packed[4:],
        packed[:-1] + b"\0",
    ):
        assert unpack(damaged, 10_000) is None
    other = msgspec.msgpack.encode(["another", "form"])
    assert unpack(len(other).to_bytes(4, "big") + zlib.compress(other), 10_000) is None


@given(st.binary(max_size=200))
def test_no_bytes_in_the_store_raise(stored: bytes) -> None:
    assert unpack(stored, 10_000) is None


def test_a_bomb_is_not_unpacked() -> None:
    bomb = zlib.compress(b"\0" * 50_000_000)
    assert unpack((1_000).to_bytes(4, "big") + bomb, 10_000) is None


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (b'{"prompt_tokens":3,"completion_tokens":4,"cost":0.1}', {"prompt_tokens": 3, "completion_tokens": 4}),
        (b'{"prompt_tokens":3,"x":[1],"prompt_tokens_details":null}', {"prompt_tokens": 3, "x": [1]}),
        (
            b'{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":1,"audio_tokens":2}}',
            {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": 2}},
        ),
    ],
)
def test_usage_is_marked_as_cached_and_keeps_what_else_it_says(usage: bytes, expected: dict[str, Any]) -> None:
    found = marked(b'{"choices":[],"usage":%b}' % usage)
    assert found is not None
    assert json.loads(found) == {"prompt_tokens_details": {"cached_tokens": 3}} | expected


@pytest.mark.parametrize("last", [b"{}", b"[]", b'{"usage":null}', b'{"usage":{}}', b'{"usage":[1]}'])
def test_an_answer_without_usage_is_not_marked(last: bytes) -> None:
    assert marked(last) is None


def test_a_bill_is_put_in_anew_and_nothing_of_the_first_one_stays() -> None:
    last = stripped(b'{"id":"x","usage":{"prompt_tokens":1,"cost":9},"x_tollgate":{"balance":12345}}')
    assert b"12345" not in last
    kept = msgspec.structs.replace(KEPT, last=last)
    assert json.loads(kept.billed("0.5", b'{"session":"s"}')) == {
        "id": "x", "usage": {"prompt_tokens": 3, "cost": 0.5}, "x_tollgate": {"session": "s"},
    }  # fmt: skip
    assert json.loads(kept.billed(None, b"{}"))["usage"] == {"prompt_tokens": 3}


def test_an_answer_given_to_many_is_held_once_and_no_more_than_there_is_room_for() -> None:
    other = msgspec.structs.replace(KEPT)
    room = Room(KEPT.size() + 10)
    assert room.take(KEPT)
    assert room.take(KEPT)
    assert not room.take(other)
    room.give_back(KEPT)
    assert not room.take(other)
    room.give_back(KEPT)
    assert room.take(other)
    room.give_back(other)
    assert room.left == KEPT.size() + 10


class Connection:
    """A client that takes everything at once, or nothing."""

    disconnected = False
    takes = True

    def begin(self, status: int, headers: Any) -> bool:
        return True

    def write(self, data: bytes, *, last: bool = False) -> bool:
        return self.takes


def recording(bytes_max: int, room: Room) -> tuple[Recording, Connection]:
    connection = Connection()
    made = Recording(cast(Any, None), cast(Any, connection), list)
    made.record(bytes_max, room)
    return made, connection


def test_a_recording_has_what_the_client_was_given_and_nothing_twice() -> None:
    room = Room(10_000)
    made, connection = recording(5_000, room)
    assert made.written([b"one", b"two"])
    connection.takes = False
    assert not made.written([b"three"])
    connection.takes = True
    assert made.written([b"three"])
    assert not made.whole
    assert made.finished([b"four"])
    assert made.whole
    assert made.payloads == [b"one", b"two", b"three", b"four"]
    assert room.left < 10_000
    made.release()
    assert room.left == 10_000


@pytest.mark.parametrize(("bytes_max", "held_max"), [(500, 10_000), (10_000, 500)])
def test_a_recording_beyond_a_bound_is_forgotten_and_the_client_gets_its_stream(bytes_max: int, held_max: int) -> None:
    room = Room(held_max)
    made, _ = recording(bytes_max, room)
    assert made.written([b"x" * 300])
    assert made.written([b"x" * 300])
    assert made.payloads is None
    assert room.left == held_max
    assert made.finished([b"end"])
    assert made.payloads is None
    assert room.left == held_max


def test_a_long_stream_goes_out_in_blocks_with_every_frame_once() -> None:
    payloads = [b"%d" % index * 9_000 for index in range(40)]
    blocks = list(msgspec.structs.replace(KEPT, payloads=payloads).blocks())
    assert [each for block in blocks for each in block] == payloads
    assert len(blocks) > 3
    assert all(sum(map(len, block[:-1])) < 64 * 1024 for block in blocks)
    assert list(msgspec.structs.replace(KEPT, payloads=[]).blocks()) == []


@pytest.mark.parametrize("delivered", [False, True])
def test_a_kept_answer_is_charged_after_its_sweep_only_where_it_was_given(delivered: bool) -> None:
    session = LiveSession(
        SessionRef("s", AccountRef("u", 0), "k", 1), "r", "route", True,
        held=9, hold_max=9, slice_cost=0, slice_low_cost=0, fence_ms=0, delivered=delivered,
        cached=Cached(TokenUsage(3, 3, 0, 4, 0), 9),
    )  # fmt: skip
    due = bill(session, Ending.CACHED, "counted")
    assert (due.micros, due.usage.output, due.source, due.outcome) == (9, 4, "cache", "completed")
    assert corrects(session, due, Gone("final", 0)) == delivered


def test_the_configuration_names_the_key_at_fault(tmp_path: Path) -> None:
    file = tmp_path / "tollgate.toml"
    text = """
[providers.one]
kind = "generic"
base_url = "http://127.0.0.1:1/v1"
[routes.kept]
candidates = [{ provider = "one", model = "m" }]
cache = { %s }
"""
    for said, told in (('price = "2"', "routes.kept.cache.price: "), ("ttl_s = 0", "routes.kept.cache.ttl_s: ")):
        file.write_text(text % said)
        with pytest.raises(settings.ConfigError, match=told):
            settings.load(file)
    file.write_text(text % 'mode = "allow"')
    cache = settings.load(file).routes["kept"].cache
    assert cache == config.ResponseCache(mode="allow")


@pytest.mark.parametrize("price", ["-0.1", "1.01", "one", "NaN", "Infinity", "", "0." + "1" * 30])
def test_a_price_that_is_no_share_is_refused(price: str) -> None:
    with pytest.raises(ValueError, match=r"^price: "):
        config.check(config.ResponseCache(price=price))


@pytest.mark.parametrize("name", ["ttl_s", "bytes_max", "wait_ms"])
def test_a_bound_of_the_cache_has_bounds(name: str) -> None:
    for value in (-1, 10**12):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            config.check(msgspec.structs.replace(config.ResponseCache(), **{name: value}))
    config.check(config.ResponseCache())
    assert config.share("0.25") == Fraction(1, 4)
