"""The ledger's Lua by hand: what a second client of a session would send. Words are placed by the header's names.

Must not: know what a script does, or keep a copy of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import redis.asyncio

from loadtests.chaos.servers import ChaosError
from loadtests.chaos.world import Account

FOLDER = Path(__file__).resolve().parents[2] / "metering" / "lua"
_HEADER = re.compile(r"^-- (USES|KEYS|ARGV): (.*)$", re.MULTILINE)


def text_of(name: str) -> tuple[str, dict[str, list[str]]]:
    """A script's whole text, and its header's names by line."""
    shebang, _, action = (FOLDER / f"{name}.lua").read_text(encoding="utf-8").partition("\n")
    header = {line: words.split() for line, words in _HEADER.findall(action)}
    shared = ["_prelude", *(f"_{used}" for used in header.get("USES", []))]
    parts = [(FOLDER / f"{file}.lua").read_text(encoding="utf-8") for file in shared]
    return "\n".join([shebang, *parts, action]), header


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


async def run(
    store: redis.asyncio.Redis, name: str, account: Account, sid: str, words: Mapping[str, str | int]
) -> list[bytes]:
    """Run a script; its reply. Raises ChaosError when its header asks for a word that is not given."""
    text, header = text_of(name)
    keys = keys_of(account, sid)
    missing = (set(header["KEYS"]) - keys.keys()) | (set(header["ARGV"]) - words.keys())
    if missing:
        raise ChaosError(f"{name}.lua asks for {', '.join(sorted(missing))}")
    placed = [keys[one] for one in header["KEYS"]]
    reply: Any = await store.eval(text, len(placed), *placed, *(str(words[one]) for one in header["ARGV"]))
    return list(reply)
