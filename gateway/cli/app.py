"""The root command, and the edge where every failure becomes one readable line and an exit code.

Must not: show a traceback (TOLLGATE_DEBUG=1 asks for one), or know what a command does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from gateway.cli import accounts, audit, credit, database, grants, keys, rebuild, serve, sessions, simulate

DONE, REFUSED, USAGE, STORES, DEFECT, INTERRUPTED = 0, 1, 2, 3, 70, 130


def _show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    from importlib import metadata

    try:
        click.echo(f"tollgate {metadata.version('tollgate')}")
    except metadata.PackageNotFoundError:
        click.echo("tollgate (run from its source tree)")
    ctx.exit()


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 refused or (audit) differences, 2 wrong usage or configuration, 3 a store cannot be "
    "reached, 70 a defect of Tollgate, 130 interrupted.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="The version.")
def root() -> None:
    """Tollgate: an LLM gateway that meters every token as it flows.

    Start it with `tollgate serve`. All other commands work on a running instance, or start its stores for their own
    duration. REDIS_URL and DATABASE_URL name stores of your own; every command takes --json.

    \b
    Example:
      tollgate serve
      tollgate accounts create "Acme Ltd"
      tollgate credits grant "Acme Ltd" 25
      tollgate keys create --account "Acme Ltd" --name laptop
    """


for _command in (
    serve.serve, simulate.simulate, database.db, accounts.accounts, keys.keys, credit.credits_, grants.grants,
    sessions.sessions, audit.audit, rebuild.rebuild,
):  # fmt: skip
    root.add_command(_command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name); the exit code."""
    try:
        answer = root.main(args=arguments, prog_name="tollgate", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        return _failed(error.format_message(), REFUSED)
    except (click.Abort, KeyboardInterrupt):
        return _failed("interrupted", INTERRUPTED)
    except Exception as error:
        if os.environ.get("TOLLGATE_DEBUG"):
            raise
        return _failed(*_readable(error))
    return answer if isinstance(answer, int) else DONE


def _failed(message: str, code: int) -> int:
    click.echo(f"tollgate: {message}", err=True)
    return code


def _readable(error: Exception) -> tuple[str, int]:
    """One line and an exit code for what the packages raise."""
    from accounts.admin import AccountsError
    from accounts.keys import KeysUnavailable
    from config.settings import ConfigError
    from gateway.children import ChildError
    from metering.grants import GrantError
    from metering.ledger import LedgerError
    from metering.policies import PolicyError
    from storage.database import FAILED, DatabaseUrlError
    from storage.embedded import EmbeddedError
    from storage.redis_client import RedisError, RedisUrlError

    message = str(error) or type(error).__doc__ or type(error).__name__
    if isinstance(error, ConfigError | DatabaseUrlError | RedisUrlError):
        return message, USAGE
    if isinstance(error, AccountsError | GrantError | PolicyError | ChildError):
        return message, REFUSED
    if isinstance(error, EmbeddedError | RedisError | LedgerError | KeysUnavailable):
        return message, STORES
    if isinstance(error, FAILED):
        return _database_message(error), STORES
    return f"a defect of Tollgate: {type(error).__name__}: {message}. TOLLGATE_DEBUG=1 shows where.", DEFECT


def _database_message(error: Exception) -> str:
    """What Postgres (or the system) said, and what helps."""
    if type(error).__name__ in ("UndefinedTableError", "UndefinedColumnError"):
        return f"The database's schema is not this version's ({error}). Run `tollgate db upgrade`."
    if isinstance(error, ConnectionError | TimeoutError):
        reason = os.strerror(error.errno) if error.errno else "no answer"
        return f"Postgres cannot be reached: {reason}. Check DATABASE_URL and that it runs."
    return (str(error) or type(error).__name__).splitlines()[0]
