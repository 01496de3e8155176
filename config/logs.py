"""JSON log lines for every process, ours and the libraries', with secrets taken out before they are written.

Must not: be called at import; each process calls `configure` once. No prompt, answer or key may be passed to a logger;
the redactor is the second line of defence, not the first.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

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


def _redact_event(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = redact(value)
    return event


def configure(level: str, process: str) -> None:
    """Send everything to standard error as one JSON object per line, with `process` in each."""
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_event,
    ]

    def name_process(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event["process"] = process
        return event

    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, name_process, *shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[name_process, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _foreign],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn").handlers.clear()
    for chatty in ("asyncio", "uvicorn.error", "uvicorn.access", "asyncpg", "alembic", "redis"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _foreign(logger: Any, name: str, event: MutableMapping[str, Any]) -> str | bytes:
    """Lines of ours arrive rendered; those of libraries are rendered here."""
    text = event.get("event")
    if len(event) == 1 and isinstance(text, str) and text.startswith("{"):
        return text
    return structlog.processors.JSONRenderer()(logger, name, event)
