"""The Lua scripts: loaded by name, their headers parsed, their arguments placed by name, run by SHA.

A script's body is its shebang, then `_prelude.lua`, then each file that its USES line names, then the file itself. A
line `-- HERE: a b` in any of them gives way to `_a.lua` and `_b.lua`: what is needed in one place is made only there.
Must not: know what any script means, or change what a header says.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from storage.redis_client import RedisReplyError

FOLDER = Path(__file__).with_name("lua")
NAMES = (
    "init", "reserve", "progress", "settle", "void", "sweep", "due", "grant", "audit", "expiring", "expire", "revoke",
    "take", "policy", "correct", "freeze", "reassert",
)  # fmt: skip
Word = str | bytes | int

_HERE = re.compile(r"^ *-- HERE: ([a-z ]+)\n", re.MULTILINE)
_HEADER = re.compile(r"^-- (USES|KEYS|ARGV|RETURN): (.*)$", re.MULTILINE)


class Caller(Protocol):
    """The part of the Redis client that scripts need."""

    def call(self, *args: Word) -> asyncio.Future[Any]:
        """Send one command; the awaited result is its reply."""


@dataclass(frozen=True, slots=True)
class Script:
    """One loaded script. `keys` and `args` are its header's names in order; a last name `sids...` takes a list."""

    name: str
    keys: tuple[str, ...]
    args: tuple[str, ...]
    returns: tuple[str, ...]
    text: str
    sha: str

    def check(self, keys: str, args: str) -> None:
        """Raise ValueError unless the header names exactly these, in this order: for callers that place by position."""
        if self.keys != tuple(keys.split()) or self.args != tuple(args.split()):
            raise ValueError(f"{self.name}.lua and its caller name different KEYS or ARGV")

    def place(self, keys: Mapping[str, Word | list[Word]], args: Mapping[str, Word | list[Word]]) -> list[Word]:
        """The words after the SHA: key count, keys, arguments. Raises ValueError for a missing or unknown name."""
        placed = _placed(self.name, self.keys, keys)
        return [len(placed), *placed, *_placed(self.name, self.args, args)]


def _placed(script: str, names: tuple[str, ...], given: Mapping[str, Word | list[Word]]) -> list[Word]:
    wanted = {name.removesuffix("...") for name in names}
    if wanted != given.keys():
        raise ValueError(f"{script}: missing {sorted(wanted - given.keys())}, unknown {sorted(given.keys() - wanted)}")
    words: list[Word] = []
    for name in names:
        value = given[name.removesuffix("...")]
        if isinstance(value, list) != name.endswith("..."):
            raise ValueError(f"{script}: {name} takes {'a list' if name.endswith('...') else 'one word'}")
        words.extend(value) if isinstance(value, list) else words.append(value)
    return words


def load(clock: str = "", changed: Mapping[str, str] = MappingProxyType({})) -> dict[str, Script]:
    """Read all scripts. `clock` is Lua placed after the prelude; tests give their own `wall_ms` with it. `changed` has
    other texts of files, by name."""
    return {name: _load(name, clock, changed) for name in NAMES}


def _read(file: str, changed: Mapping[str, str]) -> str:
    text = changed.get(file) or (FOLDER / file).read_text(encoding="utf-8")
    return _HERE.sub(lambda found: "".join(_read(f"_{used}.lua", changed) for used in found[1].split()), text)


def _load(name: str, clock: str, changed: Mapping[str, str]) -> Script:
    source = _read(f"{name}.lua", changed)
    shebang, _, action = source.partition("\n")
    if not re.fullmatch(r"#!lua( flags=[a-z-]+)?", shebang):
        raise ValueError(f"{name}.lua: the first line must be #!lua, with at most one flag")
    header = dict(_HEADER.findall(action))
    if not {"KEYS", "ARGV", "RETURN"} <= header.keys():
        raise ValueError(f"{name}.lua: the header must name KEYS, ARGV and RETURN")
    shared = ["_prelude", *(f"_{used}" for used in header.get("USES", "").split())]
    parts = [_read(f"{file}.lua", changed) for file in shared]
    parts.insert(1, clock)
    text = "\n".join([shebang, *(part for part in parts if part), action])
    return Script(
        name=name,
        keys=tuple(header["KEYS"].split()),
        args=tuple(header["ARGV"].split()),
        returns=tuple(part.strip() for part in header["RETURN"].split(" | ")),
        text=text,
        sha=hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(),
    )


async def run(client: Caller, script: Script, words: Sequence[Word]) -> Any:
    """EVALSHA, and EVAL when the server forgot the script. `words` come from `Script.place`.

    Raises what the client raises: RedisReplyError, RedisUnavailable.
    """
    try:
        return await client.call("EVALSHA", script.sha, *words)
    except RedisReplyError as error:
        if error.code != "NOSCRIPT":
            raise
    return await client.call("EVAL", script.text, *words)
