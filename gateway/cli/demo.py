"""The demo account of a fresh data folder, and the words that `serve` greets with.

Must not: seed stores that somebody else runs, or print the key anywhere but to the person who started `serve`.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gateway.cli.context import Context, opened
from gateway.cli.output import emit_json, note

if TYPE_CHECKING:
    from config.run import Run
    from config.settings import Secrets, Settings
    from metering.server_check import ServerReport

ACCOUNT_NAME = "demo"
CREDITS_MICROS = 10_000_000
KEY_FILE = "demo-key"


@dataclass(frozen=True)
class Demo:
    """The demo key and how to show it."""

    key: str = field(repr=False)
    path: Path


def read_demo(data_dir: Path) -> Demo | None:
    """The demo key of this data folder, None when it was never made (or removed). Raises OSError."""
    path = data_dir / KEY_FILE
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return Demo(text, path) if text else None


async def ensure_demo(ctx: Context) -> Demo | None:
    """The demo key, seeded now in a fresh data folder with embedded stores; None when the stores are somebody else's.

    Repeatable at any point: a second run after a kill finds the account and its grant, and makes the key.
    Raises what `accounts.admin` and `metering.grants` raise, OSError.
    """
    existing = read_demo(ctx.data_dir)
    if existing is not None or not ctx.embedded:
        return existing
    from accounts import admin
    from metering import grants

    known = [one for one in await admin.list_accounts(ctx.pool) if one.name == ACCOUNT_NAME]
    account = known[0] if known else await admin.create_account(ctx.pool, ACCOUNT_NAME)
    await grants.issue(
        ctx.pool, ctx.ledger, grants.NewGrant(id=f"demo_{account.id}", account=account.id, amount=CREDITS_MICROS)
    )
    made = await admin.create_key(ctx.pool, ctx.redis, ctx.pepper, account, "demo")
    return Demo(made.text, _write_key(ctx.data_dir / KEY_FILE, made.text))


def _write_key(path: Path, text: str) -> Path:
    """Write the key whole or not at all, readable by its owner only."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    draft.replace(path)
    return path


class Greeter:
    """The supervisor's hook and its word to the person who started it."""

    def __init__(self, config: Settings, secrets: Secrets, *, as_json: bool) -> None:
        self._config = config
        self._secrets = secrets
        self._as_json = as_json
        self._demo: Demo | None = None

    async def prepare(self, this_run: Run) -> None:
        """Before anything serves: shards, prices, the demo of a fresh data folder, and whether the secret is the same.

        Raises what `opened` and `ensure_demo` raise.
        """
        from accounts import admin
        from config import catalog
        from metering import price_versions
        from metering.server_check import inspect
        from storage.embedded import Stores

        stores, folder = Stores(this_run.redis_url, this_run.database_url), Path(this_run.data_dir)
        async with opened(self._config, self._secrets, stores, folder) as ctx:
            _refuse_unfit(await inspect(ctx.redis), allow_old=self._config.redis.allow_old_server)
            await price_versions.keep(ctx.pool, catalog.read(Path(this_run.catalog_path)))
            self._demo = await ensure_demo(ctx)
            foreign = await admin.check_pepper(ctx.pool, ctx.redis, ctx.pepper)
        if foreign:
            note(
                f"warning: {foreign} keys were made with another secret and are all invalid now. "
                f"Restore TOLLGATE_SECRET (or the file {folder / 'secret'}), or revoke them and make new ones."
            )

    def greet(self, this_run: Run) -> None:
        """Once everything serves: how to use it, on stdout."""
        url, model = base_url(this_run.host, this_run.port), next(iter(self._config.routes), "MODEL")
        key = self._demo.key if self._demo else None
        if self._as_json:
            emit_json({"url": url, "key": key, "model": model, "data_dir": this_run.data_dir}, one_line=True)
        else:
            click.echo(banner(url, key, model))


def _refuse_unfit(report: ServerReport, *, allow_old: bool) -> None:
    """Raises ConfigError for a server that would lose credit."""
    from config.settings import ConfigError

    if report.faults:
        raise ConfigError(f"REDIS_URL: this server cannot hold credit: {'; '.join(report.faults)}.")
    if report.old is not None:
        if not allow_old:
            raise ConfigError(
                f"REDIS_URL: {report.old} is older than Valkey 8.0 or Redis 8.6.3. Upgrade it, or set "
                "[redis] allow_old_server = true and accept degraded readiness."
            )
        note(f"warning: {report.old} is older than what Tollgate supports; readiness says degraded.")


def base_url(host: str, port: int) -> str:
    """Where a client on this machine reaches the gateway."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host)  # noqa: S104  (recognised, not used)
    shown = reachable or (f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def banner(url: str, key: str | None, model: str) -> str:
    """What to do next, ready to paste. Without a demo key the snippets read it from the environment."""
    shown = key or "$TOLLGATE_KEY"
    quoted = f'"{key}"' if key else 'os.environ["TOLLGATE_KEY"]'
    first = [f"Tollgate serves on {url}", f"  demo key: {key}" if key else "  make a key: tollgate keys create --help"]
    curl = f"""
curl -N {url}/v1/chat/completions \\
  -H "Authorization: Bearer {shown}" -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""
    python = f"""
{"" if key else "import os" + chr(10)}from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key={quoted})
stream = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": "Hello"}}], stream=True
)
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()
"""
    return "\n".join(
        [*first, "", "Try it with curl:", curl.rstrip(), "", "Or with Python (pip install openai):", python]
    )
