"""Logs: one JSON object a line on stderr, and no secret in it."""

from __future__ import annotations

import logging

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from streaming.dialects import timestamp


def start() -> None:
    """From now on all that is logged goes to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JSONFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)  # of libraries: a key that is short, say
    # What no line says: a fifth of what one costs (logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request, with its URL
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)  # subprotocols, perhaps a token
    logging.getLogger("aiohttp.server").addFilter(_unreadable)


class _JSONFormatter(logging.Formatter):
    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        extra = {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        line = {
            "time": timestamp(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **extra,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def _unreadable(record: logging.LogRecord) -> bool:
    """Of a request that cannot be read aiohttp says why, with its bytes, which may be a token's."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        record.exc_info, record.levelname = None, "WARNING"  # it is the client's fault
        record.reason = type(error).__name__
    return True
