"""`tollgate serve`: read the options, hand over to the supervisor, greet. Must not: start or watch a process itself."""

from __future__ import annotations

import os
from pathlib import Path

import click

from gateway.cli.context import chosen_data_dir, data_dir_option
from gateway.cli.output import json_option


@click.command(short_help="Run the gateway.")
@click.option("--host", help="Address to listen on (default: [server] host, 127.0.0.1).")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    envvar="PORT",
    show_envvar=True,
    help="Port (default: [server] port, 8080).",
)
@click.option("--workers", type=click.IntRange(1, 256), help="Data workers (default: [server] workers, 1).")
@data_dir_option
@json_option
def serve(host: str | None, port: int | None, workers: int | None, data_dir: Path | None, as_json: bool) -> int:
    """Run the gateway: its stores, migrations, workers and the ledger process, until Ctrl-C.

    The stores live in the data folder unless REDIS_URL and DATABASE_URL name your own (then TOLLGATE_SECRET is needed
    too). A fresh data folder gets a demo account with credits and a key. The configuration is the file in
    TOLLGATE_CONFIG, else ./tollgate.toml, else a default with a simulated provider.

    Says on stdout how to use it once it serves (with --json: one line); the log goes to stderr.

    \b
    Example:
      tollgate serve --port 8080 --data-dir ./data
    """
    from config import logs
    from config import settings as configuration
    from gateway.cli.demo import Greeter
    from gateway.supervisor import ServeOptions, run_supervisor

    path = configuration.find(os.environ)
    config = configuration.with_openai(configuration.load(path), os.environ)
    config = configuration.with_metrics_listen(config, os.environ)
    secrets = configuration.read_secrets(config, os.environ)
    logs.configure(config.server.log_level, "supervisor")
    greeter = Greeter(config, secrets, as_json=as_json)
    return run_supervisor(
        ServeOptions(
            settings=config,
            config_path=path,
            data_dir=chosen_data_dir(data_dir),
            environ=os.environ,
            host=host if host is not None else config.server.host,
            port=port if port is not None else config.server.port,
            workers=workers if workers is not None else config.server.workers or 1,
            hooks=(greeter.prepare,),
            on_ready=greeter.greet,
        )
    )
