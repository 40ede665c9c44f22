"""The doors, in order: request id and access log, the shape of errors, origin, who asks, limits."""

from __future__ import annotations

import logging
import math
import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

import orjson
from aiohttp import web

from handlers.identity import NOBODY, PUBLIC, holding, identify, is_room_socket
from handlers.keys import (
    CONFIG,
    GENERATION,
    IDENTITY,
    LIMITS,
    METRICS,
    QUOTA,
    REFUSED,
    REQUEST_ID,
    STATE,
    USER,
)
from handlers.origin import check_host, check_origin, headers_for, preflight
from handlers.reading import last_event_id, path_of
from streaming.dialects import openai_error
from streaming.errors import RivuletError, Unauthorized
from streaming.limits import Quota
from streaming.metrics import SLOW

access = logging.getLogger("rivulet.access")
logger = logging.getLogger("rivulet.handlers")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# What aiohttp itself refuses, by status, in our words.
_REFUSALS = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
}


@web.middleware
async def doors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """All doors in one coroutine, because each of its own takes 600 bytes of every open stream."""
    request[REQUEST_ID] = request_id(request.headers.get("X-Request-Id", ""))
    started = time.monotonic()
    response: web.StreamResponse | None = None
    try:
        try:
            response = preflight(request)
            if response is None:
                await _admit(request)
                with holding(request):
                    response = await handler(request)
        except Exception as error:
            response = _refusal(request, error)
        if request.app[STATE].draining:
            response.force_close()  # a stream from before: no request may follow it here
        return response
    finally:
        _account(request, response, time.monotonic() - started)


def request_id(given: str) -> str:
    """What a client calls its request, where that is a name; else one made here."""
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


async def _admit(request: web.Request) -> None:
    """Lets it come in, as whom it says. Raises Forbidden, Unauthorized, TooMany, BadRequest."""
    who, public = NOBODY, path_of(request) in PUBLIC
    if not public:
        check_host(request)
        check_origin(request)
    try:
        who = await identify(request)
    except Unauthorized as error:
        if not is_room_socket(request):
            raise
        request[REFUSED] = error  # a browser is told why on the socket, or never
    request[IDENTITY], request[USER] = who, who.user
    if not public and who is not NOBODY:
        note(request, await request.app[LIMITS].take("requests", who.user))


def note(request: web.Request, quota: Quota | None) -> None:
    """What is left of a rate is to be told with the answer."""
    if quota is not None:
        request[QUOTA] = quota


def _account(request: web.Request, response: web.StreamResponse | None, seconds: float) -> None:
    """Counts a request that is over, and says what it was; one that was slow in a warning. Of a
    stream its first token counts, of which its generation tells.
    """
    app, resource = request.app, request.match_info.route.resource
    status = 499 if response is None else response.status  # the client went first
    slow = False
    app[METRICS].requests[resource.canonical if resource is not None else "", str(status)] += 1
    if isinstance(response, web.Response):
        app[METRICS].request_seconds.observe(seconds)
        slow = seconds > SLOW
    if not slow and not app[CONFIG].server.access_log:
        return
    line = {
        "request_id": request[REQUEST_ID],
        "method": request.method,
        "path": request.path,  # never the query: it may carry secrets
        "status": status,
        "seconds": round(seconds, 4),
    }
    if user := request.get(USER):
        line["user"] = user
    if (generation := request.get(GENERATION)) is not None:
        line["stream_id"] = generation.id
        if generation.first_token is not None:
            line["first_token"] = round(generation.first_token, 4)
    access.log(logging.WARNING if slow else logging.INFO, "request", extra=line)


def _refusal(request: web.Request, error: Exception) -> web.StreamResponse:
    """The answer that this error means. Raises it again where the client has gone. A stream that
    broke has been cut before this (handlers/answers.py): it gets no answer in its midst.
    """
    match error:
        case RivuletError():
            if error.status in (429, 503) and _reconnects(request):
                headers = {"Cache-Control": "no-store", "Content-Type": "text/event-stream"}
                return web.Response(body=come_back(error), headers=headers)
            return error_response(request, error)
        case web.HTTPException() if error.status >= 400:
            code = _REFUSALS.get(error.status, "refused")
            refused = RivuletError(error.reason, status=error.status, code=code)
            return error_response(request, refused, {"Allow": error.headers.get("Allow", "")})
        case web.HTTPException() | ConnectionError():
            raise error
    logger.error("handler broke", exc_info=error, extra={"request_id": request[REQUEST_ID]})
    return error_response(request, RivuletError("internal error"))


def _reconnects(request: web.Request) -> bool:
    """Whether this is an `EventSource` that has been here before."""
    accepts = "text/event-stream" in request.headers.get("Accept", "")
    return accepts and last_event_id(request) is not None


def come_back(error: RivuletError) -> bytes:
    """An `EventSource` stops for good at any status but 200 (HTML standard, 9.2.2): it is told to
    ask again later, spread so that not all come at once.
    """
    return b"retry: %d\n\n" % ((error.retry_after or 1.0) * random.uniform(1000, 2000))


def error_response(
    request: web.Request,
    error: RivuletError,
    headers: Mapping[str, str] | None = None,
    beside: Mapping[str, object] | None = None,
) -> web.Response:
    """The one error body; under `/v1/` with OpenAI's fields. beside: members next to `error`."""
    body = error.body(request[REQUEST_ID])
    if path_of(request).startswith("/v1/"):
        body = openai_error(body, error.status)
    sent = {name: value for name, value in (headers or {}).items() if value} | error.headers
    sent["Cache-Control"] = "no-store"
    if error.retry_after is not None:
        sent["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return json_response({"error": body, **(beside or {})}, error.status, sent)


def json_response(
    body: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """What every answer has in its headers (a signal: streams are prepared inside the handler).
    While the server drains the connection goes after it.
    """
    if REQUEST_ID in request:
        response.headers.setdefault("X-Request-Id", request[REQUEST_ID])
    # Not `request.app`: a middleware of an application around this one may be what answers.
    app = request.match_info.apps[-1]
    response.headers.update(headers_for(request.headers.get("Origin"), app[CONFIG].cors))
    if QUOTA in request:
        for name, value in request[QUOTA].headers().items():
            response.headers.setdefault(name, value)  # a refusal tells of the rate that is over
    if app[STATE].draining:
        response.force_close()
        response.headers["Connection"] = "close"
