"""The simulated provider as a child process of a test, and the calls a test makes to it over real sockets.

Must not: import anything of the provider; it is driven the way a stranger would.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Answered:
    """One HTTP response, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def frames(self) -> list[dict[str, Any]]:
        """The JSON objects of the `data:` lines, [DONE] left out."""
        lines = (line for line in self.body.split(b"\n") if line.startswith(b"data: "))
        return [json.loads(line[6:]) for line in lines if line != b"data: [DONE]"]

    def deltas(self, name: str = "content", choice: int = 0) -> list[str]:
        found = (c for frame in self.frames() for c in frame["choices"] if c["index"] == choice)
        return [c["delta"][name] for c in found if c["delta"].get(name)]

    def finishes(self) -> list[str]:
        return [c["finish_reason"] for frame in self.frames() for c in frame["choices"] if c["finish_reason"]]

    def usages(self) -> list[Any]:
        return [frame["usage"] for frame in self.frames() if frame.get("usage") is not None]


def chat_body(model: str, say: str = "Hello there", *, stream: bool = True, usage: bool = False, **more: Any) -> bytes:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": say}], "stream": stream}
    if usage:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body | more).encode()


class Simulated:
    """A running provider. `base_url` is what an SDK is pointed at. As a context it never outlives its test."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port
        self.base_url = f"http://127.0.0.1:{port}/v1"

    @classmethod
    def start(cls, *options: str, env: Mapping[str, str] | None = None, pass_fds: tuple[int, ...] = ()) -> Simulated:
        command = [sys.executable, "-m", "loadtests.simulated_provider", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**os.environ, **(env or {})}, pass_fds=pass_fds
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.stdout.close()
            raise AssertionError(f"the simulated provider did not start: exit code {process.wait(DEADLINE_S)}")
        return cls(process, json.loads(line)["port"])

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.ended()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal (once it has ended: none) and wait. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        code = self.process.wait(DEADLINE_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answered:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answered(response.status, found, response.read())
        finally:
            connection.close()

    def chat(self, model: str, say: str = "Hello there", **fields: Any) -> Answered:
        return self.request("POST", "/v1/chat/completions", chat_body(model, say, **fields))

    def connect(self, body: bytes, *, receive_bytes: int | None = None) -> socket.socket:
        """Send a chat request over a socket that the caller reads, or does not, as it likes."""
        raw = socket.socket()
        if receive_bytes is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        raw.settimeout(DEADLINE_S)
        raw.connect(("127.0.0.1", self.port))
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        return raw

    def log(self, since: int = 0) -> list[dict[str, Any]]:
        found = self.request("GET", f"/__log?since={since}").json()
        assert isinstance(found, list)
        return found

    def last(self) -> dict[str, Any]:
        return self.log()[-1]

    def wait_for(self, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The newest log entry, as soon as it is as wanted."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            entries = self.log()
            if entries and wanted(entries[-1]):
                return entries[-1]
            time.sleep(0.01)
        raise AssertionError(f"the log did not come to what was wanted: {self.log()[-1:]}")


def read_until(raw: socket.socket, mark: bytes) -> bytes:
    """What arrives up to and with `mark`, or up to the end."""
    got = b""
    while mark not in got:
        more = raw.recv(65536)
        if not more:
            break
        got += more
    return got
