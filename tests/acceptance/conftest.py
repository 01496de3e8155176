"""One gateway for all acceptance tests of a run; its model is the simulated provider's, or a real server's.

A test module may say what it needs there: MODELS (scripted models beside the named ones), PROVIDERS (further providers,
routes and prices) and ENVIRON (variables of the gateway). Only tests that harm the gateway start one of their own.
With TOLLGATE_TEST_PROVIDER_URL, _MODEL and _KEY set (make test-real) the tests marked `any_provider` run against that.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest
from openai import AsyncOpenAI

from tests.support.gateway import Gateway, Key, config_text, running

REAL_URL = os.environ.get("TOLLGATE_TEST_PROVIDER_URL")
REAL_MODEL = os.environ.get("TOLLGATE_TEST_PROVIDER_MODEL", "")


REAL_CONFIG = f"""
[providers.real]
kind = "openai"
base_url = "{REAL_URL}"
api_key_env = "TOLLGATE_TEST_PROVIDER_KEY"
limit_field = "max_tokens"

[routes."{REAL_MODEL}"]
candidates = [{{ provider = "real", model = "{REAL_MODEL}" }}]
max_output_tokens = 4096

[prices."{REAL_MODEL}"]
input = "1"
output = "1"
"""


@pytest.fixture(scope="session")
def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The running gateway."""
    folder = tmp_path_factory.mktemp("gateway")
    config, environ = needed(request)
    if REAL_URL:
        config += REAL_CONFIG
        environ["TOLLGATE_TEST_PROVIDER_KEY"] = os.environ.get("TOLLGATE_TEST_PROVIDER_KEY", "none")
    with running(folder, config, environ=environ) as gateway:
        yield gateway


def needed(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """Configuration and variables for all acceptance modules of this run."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    modules = dict.fromkeys(item.module for item in items if item.module.__name__.startswith(__package__))
    models = dict.fromkeys(model for module in modules for model in getattr(module, "MODELS", ()))
    providers = dict.fromkeys(getattr(module, "PROVIDERS", "") for module in modules)
    config = config_text(tuple(models)) + "".join(providers)
    return config, {name: value for module in modules for name, value in getattr(module, "ENVIRON", {}).items()}


@pytest.fixture(scope="session")
def model() -> str:
    """A model that answers."""
    return REAL_MODEL or "gpt-4o-mini"


@pytest.fixture
async def key(gateway: Gateway) -> AsyncIterator[Key]:
    """A key of a fresh account with one credit."""
    async with gateway.connected():
        yield await gateway.key()


@pytest.fixture
async def client(gateway: Gateway, key: Key) -> AsyncIterator[AsyncOpenAI]:
    """The official client with that key, without retries of its own."""
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key.text, max_retries=0) as client:
        yield client


@pytest.fixture
async def http(gateway: Gateway, key: Key) -> AsyncIterator[httpx2.AsyncClient]:
    """A bare HTTP client with that key."""
    headers = {"authorization": f"Bearer {key.text}"}
    async with httpx2.AsyncClient(verify=False, base_url=gateway.url, headers=headers, timeout=20) as client:
        yield client
