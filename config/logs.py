"""JSON log lines for every process, ours and the libraries', with secrets taken out before they are written.

Must not: be called at import; each process calls `configure` once. No prompt, answer or key may be passed to a logger;
the redactor is the second line of defence, not the first.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import msgspec
import structlog

_SECRETS = re.compile(
    r"tg_live_[0-9A-Za-z_]{8,}"
    r"|(?i:bearer)\s+[^\s\"']{8,}"
    r"|\bsk-[0-9A-Za-z_-]{8,}"
    r"|(?<=://)[^/\s@:]*:[^/\s@]+(?=@)"
)
_REDACTED = "[redacted]"


def redact(text: str) -> str:
    """`text` without API keys, bearer values, provider keys and passwords in URLs."""
    return _SECRETS.sub(_REDACTED, text)


def _json(event: object, default: Callable[[Any], Any], **_: object) -> str:
    """A third of the standard encoder's time; what it does not know is shown by `default`."""
    return msgspec.json.encode(event, enc_hook=default).decode()


def _redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = redact(value)
    return event


class Lines:
    """The lines that come with every request, in the same form as all others but gathered and written by `flush()`,
    which the owner calls every tick. A structlog line with its write costs 30 us of a request's 100, one of these 2.

    Nothing is redacted here: the caller passes ids, configured names and numbers only.
    """

    PIECE_BYTES_MAX = 4_096
    """A pipe takes so much in one piece (POSIX PIPE_BUF): lines of several processes must not tear each other."""
    WAITING_MAX = 1_000
    """Lines that wait at most; the next one writes them all."""

    def __init__(self) -> None:
        self.lost = 0
        """Writes to standard error that failed, with a line or several in each."""
        self.shown = True
        self.process = ""
        self._waiting: list[bytes] = []
        self._second = -1
        self._text = ""
        self._torn = True
        """Whether long pieces may be torn by other writers: not in a file, which takes each write whole at its end."""

    def written_to(self, descriptor: int) -> None:
        """Learn what the lines are written to."""
        self._torn = not stat.S_ISREG(os.fstat(descriptor).st_mode)

    def info(self, event: str, fields: dict[str, Any]) -> None:
        """Take a line at level info. `fields` is used up."""
        if not self.shown:
            return
        fields["event"] = event
        fields["process"] = self.process
        fields["level"] = "info"
        fields["timestamp"] = self._now()
        self._waiting.append(msgspec.json.encode(fields))
        if len(self._waiting) >= self.WAITING_MAX:
            self.flush()

    def flush(self) -> None:
        """Write what waits, whole lines in each piece."""
        lines, self._waiting = self._waiting, []
        piece = b""
        for line in lines:
            if self._torn and len(piece) + len(line) >= self.PIECE_BYTES_MAX:
                _write(piece)
                piece = b""
            piece += line + b"\n"
        _write(piece)

    def _now(self) -> str:
        """UTC with microseconds, as `TimeStamper` writes it."""
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{nanoseconds // 1000:06d}Z"


def _write(data: bytes) -> None:
    """To standard error. A full disk or a reader that has gone takes lines away, and nothing else: whoever logs must
    not fail for it."""
    try:
        while data:
            data = data[os.write(2, data) :]
    except OSError:
        lines.lost += 1


class _StandardError:
    """What structlog writes to."""

    def write(self, text: str) -> None:
        _write(text.encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Nothing is kept back."""


lines = Lines()
"""This process's; `configure` sets its level and name."""


def configure(level: str, process: str) -> None:
    """Send everything to standard error as one JSON object per line, with `process` in each."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    lines.process, lines.shown = process, threshold <= logging.INFO
    lines.written_to(2)
    atexit.register(lines.flush)

    def name_process(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    shared: list[Any] = [
        name_process,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_event,
    ]
    # Our own lines bypass the logging module: a third of its cost, and they need none of its features.
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer(serializer=_json)],
        logger_factory=structlog.WriteLoggerFactory(_StandardError()),  # type: ignore[arg-type]
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(serializer=_json),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    logging.getLogger("uvicorn").handlers.clear()
    for chatty in ("asyncio", "uvicorn.error", "uvicorn.access", "asyncpg", "alembic", "redis"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, threshold))
