"""The one settings tree: TOML file plus environment secrets, read once, frozen, handed down.

Must not: be read at import time, be looked up from a global, or hold a default that hides a missing secret.
Every name carries its unit. Errors name the key and the fix.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from config import kinds, mistakes, providers, proxy_url, routing
from config.kinds import is_loopback as is_loopback  # the address of a gateway is asked the same
from config.prices import Price
from config.providers import Provider
from config.proxy_url import ProxyAddress
from config.routing import Breaker, Route
from config.tables import Table

SHIPPED = Path(__file__).with_name("tollgate.toml")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_PROVIDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,63}")
"""Without a slash: preferences, prices and breakers name `provider/model`."""
_NAME_CHARS_SHOWN = 80
CALL_MS_WITH_REPLICAS = 500
"""A settlement's call holds a wait of 250 ms for a replica; a shorter bound would take that for silence."""


_ZERO_IS_OFF = frozenset(("audit_every_ms",))
"""Keys for which 0 turns something off, in tables where everything else is at least 1."""


class ConfigError(Exception):
    """The configuration is not usable."""


class Server(Table, frozen=True):
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    metrics_listen: str = "127.0.0.1:9464"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class Bounds(Table, frozen=True):
    """Every limit of the data plane (contract 5). Bytes, milliseconds, counts."""

    body_bytes_max: int = 32 * 1024 * 1024
    bodies_bytes_max: int = 256 * 1024 * 1024
    body_inline_bytes: int = 256 * 1024
    depth_max: int = 128
    root_members_max: int = 1_000
    frame_bytes_max: int = 1024 * 1024
    answer_bytes_max: int = 64 * 1024 * 1024
    messages_max: int = 100_000
    connect_ms: int = 5_000
    headers_ms: int = 300_000
    headers_nonstream_ms: int = 600_000
    first_content_ms: int = 120_000
    first_content_hidden_ms: int = 600_000
    idle_ms: int = 120_000
    total_ms: int = 3_600_000
    client_write_ms: int = 60_000
    client_header_ms: int = 15_000
    client_body_ms: int = 60_000
    drain_s: int = 600
    live_sessions_max: int = 10_000
    commit_after_ms: int = 10_000
    keepalive_ms: int = 15_000
    settle_reply_ms: int = 250
    max_output_tokens_default: int = 16_384
    prompt_inline_bytes: int = 8 * 1024
    prompt_exact_bytes_max: int = 1024 * 1024
    cache_total_bytes_max: int = 64 * 1024 * 1024
    cache_held_bytes_max: int = 64 * 1024 * 1024
    cache_waiting_max: int = 1_000
    cache_waiting_per_answer_max: int = 250
    cache_claim_ms: int = 5_000


class Metering(Table, frozen=True):
    """Holds and leases (contract 3, metering 1.3)."""

    slice_tokens: int = 512
    slice_low_tokens: int = 256
    progress_ms: int = 1_000
    lease_ms: int = 15_000
    fence_margin_ms: int = 2_000
    output_floor_tokens: int = 16
    sweep_every_ms: int = 1_000
    flush_every_ms: int = 200
    flush_batch_max: int = 6_000
    audit_every_ms: int = 1_000
    outbox_age_s_max: int = 7_200
    outbox_memory_percent_max: int = 25


class Billing(Table, frozen=True):
    credits_per_usd: str = "1"
    markup: str = "1"


class Redis(Table, frozen=True):
    allow_old_server: bool = False
    call_ms: int = 2_000
    connect_ms: int = 2_000
    pending_max: int = 50_000
    replicas: int = 0


class Embedded(Table, frozen=True):
    """What `serve` starts beside itself. `simulate` names the provider that the simulated provider stands in for."""

    simulate: str | None = None


class Settings(Table, frozen=True):
    """The whole tree. `secrets` come from the environment only and never print."""

    server: Server = Server()
    bounds: Bounds = Bounds()
    metering: Metering = Metering()
    billing: Billing = Billing()
    redis: Redis = Redis()
    embedded: Embedded = Embedded()
    breaker: Breaker = Breaker()
    providers: dict[str, Provider] = {}
    routes: dict[str, Route] = {}
    prices: dict[str, Price] = {}
    costs: dict[str, Price] = {}


def find(environ: Mapping[str, str]) -> Path:
    """The configuration file in force: TOLLGATE_CONFIG, else ./tollgate.toml, else the shipped default."""
    named = environ.get("TOLLGATE_CONFIG")
    if named:
        return Path(named)
    local = Path("tollgate.toml")
    return local if local.exists() else SHIPPED


OPENAI = "openai"
OPENAI_KEY_ENV = "OPENAI_API_KEY"


def with_openai(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings with a provider `openai` when the environment has OPENAI_API_KEY and the file has none of that name
    (OPENAI_BASE_URL names another address, as for OpenAI's own clients). Raises ConfigError."""
    if not environ.get(OPENAI_KEY_ENV) or OPENAI in settings.providers:
        return settings
    base_url = environ.get("OPENAI_BASE_URL") or ""
    provider = Provider(kind=OPENAI, base_url=base_url, api_key_env=OPENAI_KEY_ENV)
    _check_provider(OPENAI, provider, Path("OPENAI_BASE_URL"))
    return msgspec.structs.replace(settings, providers={**settings.providers, OPENAI: provider})


METRICS_LISTEN_ENV = "TOLLGATE_METRICS_LISTEN"


def with_metrics_listen(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings with the environment's TOLLGATE_METRICS_LISTEN, which wins over the file: in a container loopback is
    of no use, whatever file is mounted. Raises ConfigError."""
    named = environ.get(METRICS_LISTEN_ENV)
    if not named:
        return settings
    try:
        listen_address(named)
    except ConfigError as error:
        raise ConfigError(f"{METRICS_LISTEN_ENV}: {error}") from None
    return msgspec.structs.replace(settings, server=msgspec.structs.replace(settings.server, metrics_listen=named))


def load(path: Path) -> Settings:
    """Read and check one file. Raises ConfigError with the key and the fix."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}. Set TOLLGATE_CONFIG to a readable file."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        settings = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {mistakes.told(str(error), raw, Settings)}") from None
    _check(settings, path)
    return settings


def _check(settings: Settings, path: Path) -> None:
    for table, least in ((settings.server, 0), (settings.bounds, 1), (settings.metering, 1), (settings.redis, 0)):
        for name in table.__struct_fields__:
            value = getattr(table, name)
            bound = 0 if name in _ZERO_IS_OFF else least
            if isinstance(value, int) and value < bound:
                raise ConfigError(f"{path}: {type(table).__name__.lower()}.{name}: {value} is below {bound}.")
    try:
        listen_address(settings.server.metrics_listen)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if settings.redis.replicas and settings.redis.call_ms < CALL_MS_WITH_REPLICAS:
        raise ConfigError(f"{path}: redis.call_ms must be {CALL_MS_WITH_REPLICAS} or more with redis.replicas.")
    if settings.bounds.bodies_bytes_max < settings.bounds.body_bytes_max:
        raise ConfigError(f"{path}: bounds.bodies_bytes_max must not be smaller than bounds.body_bytes_max.")
    if settings.metering.fence_margin_ms >= settings.metering.lease_ms:
        raise ConfigError(f"{path}: metering.fence_margin_ms must be smaller than metering.lease_ms.")
    for name, route in settings.routes.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: routes.{name}: a route's name is 1-128 of letters, digits and ._:/@+-")
        try:
            routing.check_route(route)
        except ValueError as error:
            raise ConfigError(f"{path}: routes.{mistakes.shown(name)}.{error}") from None
        for candidate in route.candidates:
            if candidate.provider not in settings.providers:
                raise ConfigError(
                    f"{path}: routes.{mistakes.shown(name)}.candidates: provider '{candidate.provider}' has no "
                    f"[providers.{candidate.provider}] table. Add it or correct the name."
                )
    for name, provider in settings.providers.items():
        if not _PROVIDER_NAME.fullmatch(name):
            raise ConfigError(
                f"{path}: providers.{mistakes.shown(name[:_NAME_CHARS_SHOWN])}: a provider's name is 1-64 of letters, "
                "digits and ._:@+- (without a slash: preferences and prices name provider/model)."
            )
        _check_provider(name, provider, path)
        _check_models(name, provider, settings, path)
    try:
        routing.check_breaker(settings.breaker)
    except ValueError as error:
        raise ConfigError(f"{path}: breaker.{error}") from None
    simulate = settings.embedded.simulate
    if simulate is not None and simulate not in settings.providers:
        raise ConfigError(f"{path}: embedded.simulate: provider '{simulate}' has no [providers.{simulate}] table.")
    if simulate is not None and kinds.speaks(settings.providers[simulate].kind) != OPENAI:
        raise ConfigError(f"{path}: embedded.simulate: the simulated provider has OpenAI's wire; '{simulate}' has not.")


def _check_provider(name: str, provider: Provider, path: Path) -> None:
    try:
        providers.check(provider)
    except ValueError as error:
        raise ConfigError(f"{path}: providers.{mistakes.shown(name)}.{error}") from None


def _check_models(name: str, provider: Provider, settings: Settings, path: Path) -> None:
    """Bounds of a model that no route asks for would bound nothing. OpenAI's own list is not known here."""
    if name == OPENAI and provider.api_key_env == OPENAI_KEY_ENV:
        return
    asked = {each.model for route in settings.routes.values() for each in route.candidates if each.provider == name}
    for model in provider.models:
        if model not in asked:
            raise ConfigError(
                f'{path}: providers.{mistakes.shown(name)}.models."{model}": no route has a candidate with this '
                "provider and model. Correct the name or remove it."
            )


class Secrets(msgspec.Struct, frozen=True):
    """What only the environment may hold. Never logged; `repr` shows names alone."""

    redis_url: str | None
    database_url: str | None
    secret: str | None
    provider_keys: dict[str, str]
    proxies: dict[str, ProxyAddress] = {}

    def __repr__(self) -> str:
        return f"Secrets(provider_keys={sorted(self.provider_keys)})"


def read_secrets(settings: Settings, environ: Mapping[str, str]) -> Secrets:
    """Collect the secrets. Raises ConfigError when external stores are set without TOLLGATE_SECRET,
    or when a provider names a variable that is not set (the simulated provider excepted)."""
    keys: dict[str, str] = {}
    for name, provider in settings.providers.items():
        if not provider.api_key_env:
            continue
        value = environ.get(provider.api_key_env, "").strip()  # a mounted file ends in a line end
        if not (value.isascii() and value.isprintable()):
            raise ConfigError(
                f"{provider.api_key_env}: the key of provider '{name}' has control or other characters that no header "
                "can carry. Set it to one line of printable ASCII."
            )
        if value:
            keys[name] = value
        elif name != settings.embedded.simulate:
            raise ConfigError(
                f"providers.{name}.api_key_env: the environment has no {provider.api_key_env}. "
                'Set it, or remove the provider; api_key_env = "" says that it asks for no key.'
            )
    proxies: dict[str, ProxyAddress] = {}
    for name, provider in settings.providers.items():
        try:
            if (proxy := proxy_url.configured(provider, environ)) is not None:
                proxies[name] = proxy
        except ValueError as error:
            raise ConfigError(f"providers.{name}.{error}") from None
    redis_url, database_url = environ.get("REDIS_URL") or None, environ.get("DATABASE_URL") or None
    secret = environ.get("TOLLGATE_SECRET") or None
    if (redis_url or database_url) and secret is None:
        raise ConfigError(
            "TOLLGATE_SECRET is not set. With REDIS_URL or DATABASE_URL every gateway needs the same secret: "
            "set it to 32 or more random characters."
        )
    if secret is not None and len(secret) < 16:
        raise ConfigError("TOLLGATE_SECRET is too short: use 32 or more random characters.")
    return Secrets(redis_url, database_url, secret, keys, proxies)


_LISTEN = re.compile(r"(?P<host>[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


def listen_address(text: str) -> tuple[str, int]:
    """Host and port of `server.metrics_listen`; no host is 127.0.0.1. Raises ConfigError."""
    found = _LISTEN.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 65_536:
        raise ConfigError(f"server.metrics_listen: '{text}' is not host:port with a port of 1-65535.")
    return found["host"].strip("[]") or "127.0.0.1", int(found["port"])


def data_dir(environ: Mapping[str, str]) -> Path:
    """Where the embedded stores keep their data. Root gets a folder that an unprivileged user may enter."""
    named = environ.get("TOLLGATE_DATA_DIR")
    if named:
        return Path(named).absolute()
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/tollgate")
    base = environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "tollgate"
