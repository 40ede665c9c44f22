"""What a request says: its body, its fields, and the position it resumes from.

Bad input never passes silently: each error names the field (RivuletError, 4xx).
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson
from aiohttp import web

from handlers.keys import CONFIG, STATE
from streaming.config import Limits
from streaming.encoders import FRAMINGS, NDJSON, SSE, TEXT, Framing
from streaming.errors import BadRequest, InvalidField, RivuletError, TooLarge, Unavailable
from streaming.events import JSON
from streaming.writer import message_chars

BODIES = 2**28  # bytes of bodies that have begun to come, or the largest one: all who send share it


async def read_json(request: web.Request, most: int = 0) -> Any:
    """The body as JSON, whatever the content type says. most: bytes of it, where that is less than
    of any body. Raises BadRequest, TooLarge, Unavailable; RivuletError where it takes too long.
    """
    limit = request.app[CONFIG].limits.body_bytes
    if most:
        limit = min(most, limit)
    patience, state = request.app[CONFIG].server.body_timeout, request.app[STATE]
    share, body = max(BODIES, limit), bytearray()
    try:
        # Those who came together are not all to be refused in one turn of the loop.
        async with asyncio.timeout(patience * random.uniform(1, 1.2)):
            while piece := await request.content.readany():
                body += piece
                state.reading += len(piece)
                if len(body) > limit:
                    message = f"the body is larger than the {limit} bytes allowed here"
                    raise _unread(request, TooLarge(message, param="body"))
                if state.reading > share:
                    message = "too much is being sent to this server"
                    busy = Unavailable(message, code="overloaded", retry_after=1)
                    raise _unread(request, busy)
    except TimeoutError:
        message = f"the body has not come within {patience:g} s"
        slow = RivuletError(message, status=408, code="body_timeout")
        raise _unread(request, slow) from None
    except web.RequestPayloadError:
        raise BadRequest("the body is not what its headers say", param="body") from None
    finally:
        state.reading -= len(body)
    return parse(body, "body")


def _unread(request: web.Request, error: RivuletError) -> RivuletError:
    """The error, and what still comes of the body is passed over: nobody takes it apart."""
    request.protocol.close()
    error.headers["Connection"] = "close"
    return error


def parse(text: bytes | bytearray | str, what: str) -> Any:
    """A body or a frame as JSON. Raises BadRequest."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the {what} is not JSON: {error}", param=what) from None
    try:
        # It goes on to a model or into a room, in objects around it; deeper nesting reads only.
        orjson.dumps([[[value]]])
    except orjson.JSONEncodeError:
        raise BadRequest(f"the {what} is nested too deeply", param=what) from None
    return value


async def read_object(request: web.Request, most: int = 0) -> JSON:
    """The body as a JSON object; see `read_json`."""
    body = await read_json(request, most)
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", param="body")
    return body


def path_of(request: web.Request) -> str:
    """Its path within this application, which may be mounted under a prefix in another."""
    mounted = request.app.router["health"].canonical
    return request.path.removeprefix(mounted.removesuffix("/health"))


def check_query(request: web.Request) -> None:
    """Raises BadRequest for a query that is not UTF-8: read on, it would be another one."""
    try:
        unquote_to_bytes(request.rel_url.raw_query_string).decode()
    except UnicodeError:
        raise BadRequest("the query is not UTF-8", param="query") from None


async def read_fields(request: web.Request) -> JSON:
    """The query of a GET; else the body, whose `model` may come in the query. Raises BadRequest."""
    if request.method == "GET":
        return dict(request.query)
    body = await read_object(request)
    if body.get("model") is None and "model" in request.query:
        body["model"] = request.query["model"]
    return body


NAME_CHARS = 512  # of a model, a conversation, a room: what is longer is too large
_DIGITS = re.compile(r"-?[0-9]{1,15}")
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")


class Fields:
    """Fields of a body or a query, checked as they are taken."""

    def __init__(self, data: Mapping[str, Any], limits: Limits) -> None:
        self.data = data
        self._limits = limits

    def text(self, name: str, default: str | None = None, *, most: int = 0) -> str:
        """A string that is not blank; the default where the field is absent or null. most:
        characters (0: as many as a prompt may have).
        """
        value = self.data.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise InvalidField(name, "is required", code="missing_field")
        if not isinstance(value, str):
            raise InvalidField(name, "must be a string")
        if not value.strip():
            raise InvalidField(name, "must not be empty")
        self._check_length(name, len(value), most)
        return value

    def flag(self, name: str) -> bool:
        """A boolean; false where the field is absent or null."""
        value = self.data.get(name)
        if value is not None and not isinstance(value, bool):
            raise InvalidField(name, "must be true or false")
        return bool(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from low to high, also as digits in a query."""
        value = self.data.get(name)
        if value is None:
            return default
        if isinstance(value, str):
            value = int(value) if _DIGITS.fullmatch(value) else None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidField(name, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from low to high, also as text in a query."""
        value = self.data.get(name, default)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not low <= number <= high:
            raise InvalidField(name, f"must be a number from {low:g} to {high:g}")
        return number

    def model(self) -> str:
        """The name of a model; "" where none is named."""
        return self.text("model", "", most=NAME_CHARS)

    def messages(self) -> list[JSON]:
        """A list of chat messages: objects with a role, and with content unless the assistant's."""
        value = self.data.get("messages")
        if value is None:
            raise InvalidField("messages", "is required", code="missing_field")
        if not isinstance(value, list):
            raise InvalidField("messages", "must be a list")
        if not value:
            raise InvalidField("messages", "must not be empty")
        if len(value) > self._limits.messages:
            message = f"messages: more than {self._limits.messages} messages"
            raise TooLarge(message, param="messages")
        for i, message in enumerate(value):
            self._check_message(f"messages[{i}]", message)
        self._check_length("messages", sum(map(message_chars, value)), 0)
        return value

    def _check_message(self, place: str, message: Any) -> None:
        if not isinstance(message, dict):
            raise InvalidField(place, "must be an object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise InvalidField(f"{place}.role", "must be a string such as user")
        if content is not None and not isinstance(content, str | list):
            raise InvalidField(f"{place}.content", "must be a string or a list of parts")
        if isinstance(content, list) and not all(isinstance(part, dict) for part in content):
            raise InvalidField(f"{place}.content", "must have objects as its parts")
        blank = not content.strip() if isinstance(content, str) else not content
        if blank and role not in ("assistant", "tool", "function"):
            raise InvalidField(f"{place}.content", "must not be empty")

    def _check_length(self, name: str, length: int, most: int) -> None:
        most = most or self._limits.prompt_chars
        if length > most:
            message = f"{name}: {length} characters are more than the {most} allowed"
            raise TooLarge(message, param=name)


def last_event_id(request: web.Request) -> str | None:
    """The position that this request resumes from, as it was sent but for bytes that are no text;
    None on a first request.
    """
    sent = request.headers.get("Last-Event-ID") or request.query.get("last_event_id") or ""
    return sent.encode(errors="replace").decode() or None


def idempotency_key(request: web.Request) -> str:
    """The request's `Idempotency-Key`; "" where it has none. Raises InvalidField."""
    given = request.headers.get("Idempotency-Key")
    if given is not None and not _IDEMPOTENCY_KEY.fullmatch(given):
        raise InvalidField("Idempotency-Key", "must be 1 to 255 visible ASCII characters")
    return given or ""


MEDIA_TYPES = {
    "text/event-stream": SSE,
    "application/x-ndjson": NDJSON,
    "application/ndjson": NDJSON,
    "application/jsonl": NDJSON,
    "text/plain": TEXT,
}


def framing(request: web.Request, default: Framing) -> Framing:
    """The framing that `format=` or `Accept` asks for. Raises InvalidField."""
    wish = request.query.get("format")
    if wish is not None:
        found = FRAMINGS.get(wish) or MEDIA_TYPES.get(wish)
        if found is None:
            raise InvalidField("format", "must be sse, ndjson or text")
        return default if found.name == default.name else found
    accepted = [part.strip().lower() for part in request.headers.get("Accept", "").split(",")]
    best, best_quality = default, 0.0
    anything = any(part.startswith("*/*") for part in accepted)
    for part in accepted:
        name, _, parameters = part.partition(";")
        found = MEDIA_TYPES.get(name.strip())
        # `application/json, text/plain, */*` is what axios always sends: no wish for bare text.
        if found is None or (found is TEXT and anything):
            continue
        quality = _quality(parameters)
        if quality > best_quality:
            best, best_quality = found, quality
    return default if best.name == default.name else best  # a row may have its own NDJSON


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
