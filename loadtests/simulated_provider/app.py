"""What each address answers: the model's endpoints under /v1, and the test's own under /__log and /__requests.

Must not: touch sockets; it turns a request into a plan, and the connection plays it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from urllib.parse import parse_qs, unquote

from loadtests.simulated_provider import chat, plan, scripts, wire
from loadtests.simulated_provider.chat import BadRequest
from loadtests.simulated_provider.log import Exchange, Request, ServiceLog
from loadtests.simulated_provider.plan import Pace, Plan
from loadtests.simulated_provider.scripts import Knobs, Reply

_CREATED = 1_721_172_741


class Provider:
    """The state that all connections share: the log, the pace, and how often a tag has failed."""

    def __init__(self, log: ServiceLog, pace: Pace) -> None:
        self.log, self.pace = log, pace
        self.tally: Counter[str] = Counter()
        self._boot = secrets.token_hex(8)

    def respond(self, request: Request) -> tuple[Plan, Exchange | None]:
        """The plan for a request, and its entry in the log (none for the log's own addresses)."""
        if request.path.startswith("/__"):
            return self._plain(self._control(request), request), None
        exchange = self.log.begin(request)
        serial = hashlib.sha256(f"{self._boot}:{exchange.n}".encode()).hexdigest()[:32]
        if (request.method, request.path) == ("POST", "/v1/chat/completions"):
            return self._chat(request, exchange, serial), exchange
        return self._plain(self._public(request), request, serial), exchange

    def _plain(self, reply: Reply, request: Request, serial: str = "control") -> Plan:
        return plan.reply_plan(reply, Knobs(self.tally, stream=False, chunked=not request.http10), serial)

    def _chat(self, request: Request, exchange: Exchange, serial: str) -> Plan:
        try:
            asked = chat.parse(request.body)
            exchange.model, exchange.stream = asked.model, asked.stream
            knobs = plan.knobs_for(asked, self.pace, self.tally)
        except BadRequest as refused:
            return self._plain(_refusal(refused), request, serial)
        knobs.chunked = knobs.chunked and not request.http10
        return plan.plan(asked, knobs, serial, exchange)

    def _public(self, request: Request) -> Reply:
        if request.path == "/v1/models" and request.method == "GET":
            return Reply(body=wire.encode({"object": "list", "data": [_model(m) for m in scripts.models()]}))
        if request.path.startswith("/v1/models/") and request.method == "GET":
            return _one_model(unquote(request.path.removeprefix("/v1/models/")))
        message = f"Invalid URL ({request.method} {request.path})"
        return Reply(404, body=wire.error_body(message, "invalid_request_error"))

    def _control(self, request: Request) -> Reply:
        if request.path == "/__log" and request.method == "DELETE":
            self.log.reset()
            self.tally.clear()
            return Reply(body=b"[]")
        if request.path == "/__log" and request.method == "GET":
            since = parse_qs(request.query).get("since", ["0"])[0]
            return Reply(body=self.log.listed(int(since) if since.isdecimal() else 0))
        _, _, rest = request.path.partition("/__requests/")
        number, _, part = rest.partition("/")
        exchange = self.log.exchange(int(number)) if number.isdecimal() else None
        if exchange is not None and request.method == "GET":
            return _part(exchange, part)
        return Reply(404, body=wire.error_body("No such page or no such request any more.", "invalid_request_error"))


def _part(exchange: Exchange, part: str) -> Reply:
    """What is kept of a request: body, headers, and the response's body where it was recorded."""
    if part == "headers":
        return Reply(body=wire.encode(exchange.request.shown_headers()))
    if part == "body":
        return Reply(body=exchange.request.body, content_type="application/octet-stream")
    if part == "response" and exchange.response is not None:
        return Reply(body=bytes(exchange.response), content_type="application/octet-stream")
    return Reply(404, body=wire.error_body("Nothing was kept under that name.", "invalid_request_error"))


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": _CREATED, "owned_by": "simulated"}


def _one_model(name: str) -> Reply:
    try:
        scripts.turn(Knobs(Counter(), stream=False), name)
    except BadRequest as refused:
        return _refusal(refused)
    return Reply(body=wire.encode(_model(name)))


def _refusal(refused: BadRequest) -> Reply:
    body = wire.error_body(refused.message, "invalid_request_error", refused.param, refused.code)
    return Reply(refused.status, body=body)
