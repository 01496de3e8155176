"""`tollgate simulate`: the simulated provider in the foreground. Must not: know what it simulates."""

from __future__ import annotations

import click

from gateway.cli.output import json_option


@click.command(short_help="Run the simulated provider.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=9137, show_default=True, help="0 takes a free one.")
@click.option("--log", type=click.Path(dir_okay=False), help="Append one JSON line per request that ended.")
@click.option("--interval-ms", type=float, default=20.0, show_default=True, help="Pause between tokens.")
@click.option("--ttft-ms", type=float, default=200.0, show_default=True, help="Pause before the first token.")
@click.option("--allow-any-host", is_flag=True, help="Listen beyond loopback: there is no password.")
@json_option
def simulate(
    host: str, port: int, log: str | None, interval_ms: float, ttft_ms: float, allow_any_host: bool, as_json: bool
) -> int:
    """Run a provider that speaks OpenAI's wire, with exact usage and scripted trouble chosen by model name.

    Prints {"port": N} on stdout when it listens (with --json too) and ends with Ctrl-C.

    \b
    Example:
      tollgate simulate --port 9137 --log served.jsonl
    """
    from loadtests.simulated_provider.server import main

    arguments = ["--host", host, "--port", str(port), "--interval-ms", str(interval_ms), "--ttft-ms", str(ttft_ms)]
    arguments += ["--log", log] if log else []
    arguments += ["--allow-any-host"] if allow_any_host else []
    return main(arguments)
