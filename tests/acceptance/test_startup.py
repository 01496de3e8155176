"""How the gateway starts: with OpenAI's own models when there is a key for them, and with one line when it cannot."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from config.providers import Provider
from config.routing import Route
from config.settings import OPENAI, SHIPPED, Settings, read_secrets
from gateway.health import BEHIND
from gateway.openai_models import offered_routes
from tests.support.gateway import CONFIG, OURS, ROOT, Gateway, running, until
from tests.support.outages import frozen, ready, server_pids
from tests.support.ports import free_port
from tests.support.raw_client import Lateness
from tests.support.rawserver import RawServer, answers
from tests.support.simulated_provider import Simulated
from tests.support.strict_client import connected

KEY = "sk-canary-0123456789abcdef"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


async def listed(gateway: Gateway, key: str) -> set[str]:
    async with connected(gateway.port) as client:
        answer = await client.request("GET", "/v1/models", key)
    return {model["id"] for model in answer.json()["data"]}


async def test_with_openais_key_its_priced_models_are_served_and_nothing_is_simulated(tmp_path: Path) -> None:
    with Simulated.start("--port", "0") as openai:
        environ = {"OPENAI_API_KEY": f"{KEY}\n", "OPENAI_BASE_URL": openai.base_url}
        with running(tmp_path, SHIPPED.read_text(), environ=environ) as gateway:
            key = await gateway.key()
            offered = {one["id"] for one in openai.request("GET", "/v1/models").json()["data"]}
            models = await listed(gateway, key.text)
            assert "gpt-4o-mini" in models
            assert len(models) > 1
            assert models < offered  # those without a price are not served
            for model in sorted(models):
                async with connected(gateway.port) as client:
                    answer = await client.chat(key.text, {"model": model, **ASK})
                assert answer.status == 200, model
                entry = openai.last()
                assert entry["model"] == model
                assert entry["authorization_sha256"] == hashlib.sha256(f"Bearer {KEY}".encode()).hexdigest()
            assert KEY not in gateway.log.read_text()


async def test_without_openais_list_the_start_goes_on_with_a_warning(tmp_path: Path) -> None:
    environ = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": f"http://127.0.0.1:{free_port()}/v1"}
    with running(tmp_path, SHIPPED.read_text(), environ=environ) as gateway:
        key = await gateway.key()
        assert await listed(gateway, key.text) == {"gpt-4o-mini"}
        log = gateway.log.read_text()
        assert re.search(r'"event":\s*"OpenAI\'s models could not be listed', log)
        assert KEY not in log


def refused(config: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    """Exit code and the one line of a start that must fail."""
    with tempfile.TemporaryDirectory(prefix="tg-") as data:
        command = [sys.executable, "-m", "gateway.cli", "serve", "--port", "0", "--data-dir", data, *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        inherited |= {"TOLLGATE_CONFIG": str(config), "TOLLGATE_TEST_NOT_DURABLE": "1", **environ}
        done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False, timeout=60)
    words = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("{")]
    assert len(words) == 1, words
    return done.returncode, words[0]


def config_of(folder: Path, text: str = "") -> Path:
    file = folder / "tollgate.toml"
    file.write_text(text or SHIPPED.read_text())
    return file


STORE = {"TOLLGATE_SECRET": "0123456789abcdef0123456789abcdef"}


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("postgresql://user:hun/ter2@127.0.0.1/db", 2),
        ("postgresql://user:hun#ter2@127.0.0.1/db", 2),
        ("postgresql://user:hunter2@127.0.0.1:hunter2/db", 2),
        ("postgresql://user:hunter2@/db?host=127.0.0.1&port=hunter2", 2),
        ("postgresql://user:hunter2@127.0.0.1/db?sslmode=no", 2),
        ("postgresql://user:hunter2@no-such-host.invalid/db", 3),
        ("postgresql://user:hunter2@127.0.0.1:1/db", 3),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line_that_names_the_variable(
    tmp_path: Path, url: str, code: int
) -> None:
    got, line = refused(config_of(tmp_path), DATABASE_URL=url, **STORE)
    assert (got, "DATABASE_URL" in line) == (code, True), line
    assert "hun" not in line
    assert "defect" not in line


@pytest.mark.parametrize(
    ("url", "code", "named"),
    [
        ("redis://:hunter2@no-such-host.invalid:6379/0", 3, "no-such-host.invalid:6379"),
        ("redis://:hunter2@127.0.0.1:1/0", 3, "127.0.0.1:1"),
        ("redis://:hunter2@127.0.0.1:hunter2/0", 2, "REDIS_URL"),
    ],
)
def test_a_redis_that_cannot_be_used_is_one_line_that_says_where_it_was_looked_for(
    tmp_path: Path, url: str, code: int, named: str
) -> None:
    got, line = refused(config_of(tmp_path), REDIS_URL=url, **STORE)
    assert (got, named in line, "Redis" in line) == (code, True, True), line
    assert "hun" not in line
    assert "defect" not in line
    assert "Traceback" not in line


def test_a_metrics_address_that_is_taken_is_one_line_that_names_the_key(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = config_of(tmp_path, f'[server]\nmetrics_listen = "{address}"\n')
        code, line = refused(config, "--host", "0.0.0.0")
    assert code == 2
    assert "server.metrics_listen" in line
    assert address in line
    assert "PORT=" not in line  # another address's advice


def test_a_providers_key_with_a_line_end_inside_is_one_line_that_names_the_variable(tmp_path: Path) -> None:
    code, line = refused(config_of(tmp_path), OPENAI_API_KEY=f"{KEY}\n{KEY}")
    assert (code, "OPENAI_API_KEY" in line, KEY in line) == (2, True, False)


async def test_probes_do_not_wait_for_a_store_and_ready_names_what_is_degraded(tmp_path: Path) -> None:
    config = CONFIG.split("[prices.default-price-table]")[0].split("[routes.")[0]
    with running(tmp_path, config) as gateway:
        await ready(gateway)

        async def probe() -> tuple[int, dict[str, Any], float]:
            began = time.monotonic()
            async with connected(gateway.port) as client:
                answer = await client.request("GET", "/health/ready")
            return answer.status, answer.json(), time.monotonic() - began

        with frozen(await server_pids(gateway, "postgres")):
            slowest = 0.0

            async def degraded() -> bool:
                nonlocal slowest
                status, found, seconds = await probe()
                assert status == 200
                slowest = max(slowest, seconds)
                return bool(found["status"] == "degraded" and found["parts"]["postgres"] != "ok")

            async with Lateness(gateway) as late:
                await until(degraded)
                for _ in range(20):
                    assert await degraded()
            assert slowest < 0.8 + late.ms / 1000
        await ready(gateway)
        assert gateway.process is not None
        (ledger,) = gateway.children("gateway.ledger_process")
        async with gateway.stores() as stores:
            with frozen([ledger]):
                await stores.redis.call("DEL", "journal:status")

                async def told() -> bool:
                    status, found, _ = await probe()
                    assert status == 200
                    return (found["parts"]["journal"], found["status"]) == ("no flusher running", "degraded")

                await until(told)

        async def well() -> bool:
            _, found, _ = await probe()
            word = found["parts"]["journal"]
            return bool(found["status"] == "ok" and (word == "ok" or word.endswith(BEHIND)))

        await until(well)


async def test_models_that_reason_unseen_are_waited_for() -> None:
    names = ["gpt-4o-mini", "gpt-5", "gpt-5.1-mini", "gpt-6", "o1", "o3-mini"]
    routes = await offered(names)
    assert list(routes) == names
    assert [name for name, route in routes.items() if route.hidden_reasoning] == names[1:]


CHAT = [
    "chatgpt-4o-latest", "ft:gpt-4o-mini:image-team:pro:a1", "gpt-3.5-turbo", "gpt-4", "gpt-4-turbo-preview", "gpt-4.1",
    "gpt-4o", "gpt-4o-2024-05-13", "gpt-4o-audio-preview", "gpt-4o-search-preview", "gpt-5-chat-latest", "gpt-5-mini",
    "gpt-5-search-api", "gpt-audio", "gpt-oss-120b", "o1", "o4-mini",
]  # fmt: skip
OTHER = [
    "babbage-002", "chatgpt-image-latest", "codex-mini-latest", "computer-use-preview", "dall-e-3", "davinci-002",
    "ft:davinci-002:team::a1", "gpt-3.5-turbo-instruct", "gpt-4o-mini-realtime-preview", "gpt-4o-mini-tts",
    "gpt-4o-transcribe", "gpt-4o-transcribe-diarize", "gpt-5-codex", "gpt-5-pro", "gpt-image-1", "gpt-realtime",
    "o1-pro", "o3-deep-research", "omni-moderation-latest", "sora-2", "text-embedding-3-small", "tts-1-hd", "whisper-1",
]  # fmt: skip


async def test_models_that_do_not_chat_are_not_offered() -> None:
    assert list(await offered(CHAT + OTHER)) == CHAT


async def offered(names: list[str]) -> dict[str, Route]:
    """The routes for what a provider lists."""
    body = msgspec.json.encode({"data": [{"id": name} for name in names]})
    async with RawServer(answers(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))) as server:
        provider = Provider(kind="openai", base_url=f"http://127.0.0.1:{server.port}/v1/", api_key_env="OPENAI_API_KEY")
        settings = Settings(providers={OPENAI: provider})
        return await offered_routes(settings, read_secrets(settings, {"OPENAI_API_KEY": KEY}))
