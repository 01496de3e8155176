"""The Lua files keep the rules of money scripts: headers say what bodies do, no number leaves as 1e+14."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metering import scripts
from metering.keys import SHARDS, shard_of
from metering.redis_ledger import RedisLedger
from metering.scripts import FOLDER, NAMES, Script, Word

LOADED = scripts.load()
FILES = sorted(FOLDER.glob("*.lua"))
READS = frozenset(("GET", "HGET", "HMGET", "HGETALL", "HLEN", "ZCARD", "ZSCORE", "ZRANGE", "ZRANGEBYSCORE", "TIME"))
WRITES = frozenset(("SET", "HSET", "HSETNX", "HDEL", "DEL", "ZADD", "ZREM", "XADD", "PEXPIRE"))


JOINED_IDS = re.compile(r"\b(uid|gid) \.\. '[:|][a-z]?'( \.\. (sid|gid))?")
"""The only joints: a field's name of a grant, a member of leases; ids are strings that a check let pass."""


def code(text: str) -> str:
    """The text without comments."""
    return re.sub(r"--[^\n]*", "", text)


class Nobody:
    def call(self, *args: Word) -> object:
        raise AssertionError("no call is made here")


@pytest.mark.parametrize("name", NAMES)
def test_the_body_unpacks_exactly_the_arguments_of_its_header(name: str) -> None:
    script = LOADED[name]
    plain = [arg for arg in script.args if not arg.endswith("...")]
    keys = [key for key in script.keys if not key.endswith("...")]
    assert f"local {', '.join(keys)} = unpack(KEYS)" in script.text
    assert f"local {', '.join(plain)} = unpack(ARGV)" in script.text


@pytest.mark.parametrize("name", NAMES)
def test_the_body_refuses_any_other_number_of_arguments(name: str) -> None:
    script = LOADED[name]
    if script.keys[-1].endswith("..."):
        assert f"if #KEYS < {len(script.keys) - 1} or #ARGV ~= #KEYS - 3 then" in script.text
    else:
        assert f"if #KEYS ~= {len(script.keys)} or #ARGV ~= {len(script.args)} then" in script.text


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_named_in_the_header_and_every_named_answer_is_given(name: str) -> None:
    script = LOADED[name]
    promised = {code for answer in script.returns for code in answer.split(" ")[0].split("|")}
    used = code(script.text)
    given = set(re.findall(r"return \{ '([A-Z_]+)'", used)) | set(re.findall(r"refuse\('([A-Z_]+)'", used))
    assert given == promised


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_marked_that_may_run_out_of_memory_and_those_that_only_read(
    name: str,
) -> None:
    flags = dict.fromkeys(("settle", "void", "sweep", "freeze"), "allow-oom") | dict.fromkeys(
        ("due", "audit", "expiring"), "no-writes"
    )
    first = LOADED[name].text.split("\n", 1)[0]
    assert first == ("#!lua" + (f" flags={flags[name]}" if name in flags else ""))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_number_leaves_lua_except_as_whole_digits(path: Path) -> None:
    text = code(path.read_text())
    assert ".." not in JOINED_IDS.sub("", text)
    for banned in ("tostring", "cjson", "cmsgpack", "%d", "%g", "%i"):
        assert banned not in text.replace("'^%d+$'", "").replace("(%d+)", ""), banned
    formats = re.findall(r"format\('([^']*)'", text)
    directives = {found for one in formats for found in re.findall(r"%[^a-zA-Z%]*[a-zA-Z]", one)}
    assert directives <= {"%s", "%.0f", "%02.0f", "%015.0f", "%016.0f"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_keys_come_only_from_keys(path: Path) -> None:
    text = code(path.read_text())
    assert not re.findall(r"call\('[A-Z]+',\s*['\"(]", text), "a command's first argument must be a name from KEYS"
    assert not re.findall(r"\{v", text)
    assert "redis.pcall" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_after_the_first_write_there_is_no_read_and_no_check(path: Path) -> None:
    text = path.read_text()
    for part in text.split("-- Writes:")[1:]:
        body = code(part.split("\nend\n")[0])
        assert set(re.findall(r"call\('([A-Z]+)'", body)) <= WRITES
        assert "error(" not in body
        assert "stored(" not in body
    every = set(re.findall(r"call\('([A-Z]+)'", code(text)))
    assert every <= READS | WRITES | {"XLEN"}


def test_arguments_are_placed_by_name_whatever_their_order() -> None:
    script = LOADED["init"]
    assert script.place({"meta": "m"}, {"ep": 1}) == [1, "m", 1]
    audit = LOADED["audit"]
    keys: dict[str, Word | list[Word]] = {
        "sessions": ["s1", "s2"],
        "leases": "L",
        "grants": "b",
        "order": "g",
        "account": "a",
        "meta": "m",
    }
    assert audit.place(keys, {"sids": ["1", "2"], "uid": "u", "ep": 1}) == [
        7, "m", "a", "g", "b", "L", "s1", "s2", 1, "u", "1", "2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "args"),
    [
        ({"meta": "m"}, {}),
        ({"meta": "m"}, {"ep": 1, "extra": 2}),
        ({}, {"ep": 1}),
        ({"meta": ["m"]}, {"ep": 1}),
    ],
)
def test_a_missing_unknown_or_misshapen_argument_is_an_error(keys: dict[str, str], args: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="init"):
        LOADED["init"].place(dict(keys), dict(args))


def test_a_script_whose_header_moved_does_not_start_a_ledger() -> None:
    moved = dict(LOADED)
    old = moved["settle"]
    moved["settle"] = Script(old.name, old.keys, old.args[::-1], old.returns, old.text, old.sha)
    with pytest.raises(ValueError, match=r"settle\.lua"):
        RedisLedger(Nobody(), loaded=moved)  # type: ignore[arg-type]


def test_two_versions_of_a_script_have_two_addresses() -> None:
    assert scripts.load("local unused = 1")["settle"].sha != LOADED["settle"].sha
    assert scripts.load()["settle"].sha == LOADED["settle"].sha


def test_all_keys_of_a_shard_share_its_hash_tag() -> None:
    shard = SHARDS[5]
    names = [getattr(shard, name) for name in shard.__slots__ if name != "number"]
    assert all(re.fullmatch(r"[a-zLX]:\{v005\}:?", name) for name in names)
    assert len({name[0] for name in names}) == len(names)
    assert SHARDS[127].session == "s:{v127}:"


def test_an_account_is_given_a_shard_by_the_crc_of_its_id() -> None:
    assert shard_of("123456789") == 0xCBF43926 % 128
