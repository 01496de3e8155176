"""The ledger's Lua by hand: what a second client of a session would send. Words are placed by the header's names.

Must not: know what a script does, or keep a copy of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import redis.asyncio

from loadtests.chaos.servers import ChaosError
from loadtests.chaos.world import Account

FOLDER = Path(__file__).resolve().parents[2] / "metering" / "lua"
_HEADER = re.compile(r"^-- (USES|KEYS|ARGV): (.*)$", re.MULTILINE)
_HERE = re.compile(r"^ *-- HERE: ([a-z ]+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Script:
    """A script's whole text, as gateways load it, and its header's names."""

    text: str
    keys: tuple[str, ...]
    args: tuple[str, ...]


@cache
def script_of(name: str) -> Script:
    """The script of this name, put together by the same two lines of its files: USES and HERE."""
    shebang, _, action = _read(name).partition("\n")
    header = {line: tuple(words.split()) for line, words in _HEADER.findall(action)}
    shared = ["_prelude", *(f"_{used}" for used in header.get("USES", ()))]
    return Script("\n".join([shebang, *map(_read, shared), action]), header["KEYS"], header["ARGV"])


def _read(file: str) -> str:
    text = (FOLDER / f"{file}.lua").read_text(encoding="utf-8")
    return _HERE.sub(lambda found: "".join(_read(f"_{used}") for used in found[1].split()), text)


def keys_of(account: Account, sid: str) -> dict[str, str]:
    """The keys of one session of an account, by the headers' names."""
    at = account.shard
    return {
        "meta": at.meta,
        "account": at.account + account.id,
        "order": at.order + account.id,
        "grants": at.grants + account.id,
        "session": at.session + sid,
        "leases": at.leases,
        "limits": at.limits + account.key_id,
        "idempotency": at.idempotency,
        "outbox": at.outbox,
        "expiries": at.expiries,
    }


async def epoch(store: redis.asyncio.Redis, account: Account) -> int:
    """The epoch of the account's shard. Raises ChaosError where there is none, or it is frozen."""
    found = int(await store.hget(account.shard.meta, "ep") or 0)
    if found <= 0:
        raise ChaosError(f"shard {account.shard.number} is frozen")
    return found


def placed(name: str, account: Account, sid: str, words: Mapping[str, str | int]) -> list[str]:
    """The words after a script's text. Raises ChaosError when its header asks for a word that is not given."""
    script, keys = script_of(name), keys_of(account, sid)
    missing = (set(script.keys) - keys.keys()) | (set(script.args) - words.keys())
    if missing:
        raise ChaosError(f"{name}.lua asks for {', '.join(sorted(missing))}")
    return [str(len(script.keys)), *(keys[one] for one in script.keys), *(str(words[one]) for one in script.args)]


async def run(
    store: redis.asyncio.Redis, name: str, account: Account, sid: str, words: Mapping[str, str | int]
) -> list[bytes]:
    """Run a script; its reply. Raises ChaosError as `placed` does."""
    count, *rest = placed(name, account, sid, words)
    reply: Any = await store.eval(script_of(name).text, int(count), *rest)
    return list(reply)
