"""The simulated provider's own log, read on from where it was read last: it grows with every test of a run."""

from __future__ import annotations

from typing import Any

import httpx2


class ProviderLog:
    """The log of the provider at `url` (without /v1)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._entries: dict[int, dict[str, Any]] = {}
        self._done = 0

    async def entries(self, client: httpx2.AsyncClient) -> list[dict[str, Any]]:
        """All entries as they are now, in order."""
        fresh = await self._since(client, max(0, self._done - 1))
        if self._done and (not fresh or fresh[0] != self._entries[self._done]):  # emptied, or another process
            self._entries, self._done = {}, 0
            fresh = await self._since(client, 0)
        self._entries.update((entry["n"], entry) for entry in fresh)
        for entry in fresh:
            if entry["n"] > self._done:
                if entry["running"]:
                    break
                self._done = entry["n"]
        return list(self._entries.values())

    async def _since(self, client: httpx2.AsyncClient, number: int) -> list[dict[str, Any]]:
        answer = await client.get(f"{self._url}/__log", params={"since": number})
        found: list[dict[str, Any]] = answer.json()
        return found


_logs: dict[str, ProviderLog] = {}


def provider_log(url: str) -> ProviderLog:
    """The one reader of this provider's log."""
    return _logs.setdefault(url, ProviderLog(url))
