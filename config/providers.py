"""`[providers.<name>]`: one upstream, how it is reached, how much may be under way there, and how its data is treated.

Must not: read the environment (keys are named, not held), or know the routes.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from config import kinds, proxy_url
from config.tables import Table, at_least

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Limits(Table, frozen=True):
    """How much a gateway may have under way at a provider, or at one of its models; None is no bound. A gateway's
    workers share it evenly."""

    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


class Queue(Table, frozen=True):
    """How many calls of a worker may wait for a place, and for how long. A length of 0: nobody waits."""

    length_max: int = 100
    wait_ms: int = 10_000


class Probe(Table, frozen=True):
    """Active checks: the provider's list of models is asked for every `every_ms`. It tells which candidates' models
    are there, and whether a provider that failed answers again."""

    every_ms: int = 60_000
    timeout_ms: int = 10_000


class Provider(Table, frozen=True):
    """One upstream. `kind` names a row of `config.kinds`, which fills in what the table leaves out once it is made."""

    kind: str
    base_url: str = ""
    api_key_env: str | None = None
    insecure: bool = False
    include_usage: bool | None = None
    clean_eof: bool | None = None
    limit_field: kinds.Limit | None = None
    on_disconnect: Literal["cancel", "finish"] = "cancel"
    price_provider: str | None = None
    drop_unsupported: tuple[str, ...] | None = None
    continuation: kinds.Continuation | None = None
    refuse: tuple[str, ...] | None = None
    options: dict[str, str] = {}
    http2: bool = False
    proxy: str | None = None
    proxy_url_env: str | None = None
    proxy_env: bool = False
    limits: Limits = Limits()
    models: dict[str, Limits] = {}
    queue: Queue = Queue()
    tags: tuple[str, ...] = ()
    sticky: bool = True
    probe: Probe | None = None

    def __post_init__(self) -> None:
        for name, value in kinds.resolved(self).items():
            msgspec.structs.force_setattr(self, name, value)

    def __repr__(self) -> str:  # `proxy` may hold a password
        return f"Provider(kind={self.kind!r}, base_url={self.base_url!r})"

    @property
    def bounded(self) -> bool:
        """Whether it, or one of its models, has limits."""
        return any(limits != Limits() for limits in (self.limits, *self.models.values()))


def check(provider: Provider) -> None:
    """Raises ValueError, which begins with the key at fault."""
    kinds.check(provider)
    proxy_url.check(provider)
    for key, limits in (("limits", provider.limits), *((f'models."{name}"', own) for name, own in _models(provider))):
        _in(key, limits, ("concurrent", "requests_per_minute", "tokens_per_minute"), 1)
    _in("queue", provider.queue, ("length_max", "wait_ms"), 0)
    if provider.probe is not None:
        _in("probe", provider.probe, ("every_ms", "timeout_ms"), 100)
    for tag in provider.tags:
        if not _TAG.fullmatch(tag):
            raise ValueError(f"tags: '{tag[:64]}' is not 1-64 letters, digits, - or _.")


def _models(provider: Provider) -> list[tuple[str, Limits]]:
    return list(provider.models.items())


def _in(key: str, table: Table, names: tuple[str, ...], least: int) -> None:
    try:
        at_least(table, names, least)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
