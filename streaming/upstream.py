"""The OpenAI-compatible upstream: a model call over HTTP, its answer decoded as it streams.

The SDK owns authentication, errors and the base URL. The bytes come over an aiohttp session of
ours, and each `data:` line is decoded once with orjson: the SDK's own transport costs about 80 us a
chunk and its typed chunks about 200 us more. Retries are the generation's: some failures come after
the status and before the first token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import httpx2
import openai
import orjson
from yarl import URL

from streaming.errors import UpstreamError
from streaming.events import JSON
from streaming.models import ModelCall, Piece

DRAIN = 1.0  # seconds for the last bytes after [DONE], so that the connection can serve again
KEEPALIVE = 60.0  # seconds that an idle connection is kept: a TLS handshake spared in a first token
LINE_BYTES = 32 << 20  # an unfinished line past this is an attack or a broken upstream
MESSAGE_CHARS = 1000  # of an upstream's error message that go on to the client


class OpenAIUpstream:
    """One upstream, one pool of connections, any number of calls at once.

    base_url: ends in `/v1` as OpenAI's does; "" is OpenAI itself. connect_timeout in seconds; the
    waits after it are the generation's to limit.
    """

    def __init__(self, base_url: str, api_key: str, connect_timeout: float) -> None:
        self._base_url = base_url or "https://api.openai.com/v1"
        self._api_key = api_key
        self._connect_timeout = connect_timeout
        self._client: openai.AsyncOpenAI | None = None
        self._session: aiohttp.ClientSession | None = None
        self._draining: set[asyncio.Task[None]] = set()

    def _open(self) -> openai.AsyncOpenAI:
        # Not before the first call: a session belongs to the loop that runs.
        if self._client is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE),
                cookie_jar=aiohttp.DummyCookieJar(),  # one tenant's cookie is not another's
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
                trust_env=True,
            )
            self._client = openai.AsyncOpenAI(
                base_url=self._base_url,
                # An upstream without keys gets a word in its place: the SDK insists on one.
                api_key=self._api_key or "none",
                max_retries=0,
                http_client=httpx2.AsyncClient(transport=_Transport(self._session)),
            )
        return self._client

    async def stream(self, call: ModelCall) -> AsyncGenerator[list[Piece], None]:
        """See ModelSource.stream."""
        options = {**(call.params.get("stream_options") or {}), "include_usage": True}
        fields = {"stream": True, "stream_options": options}
        body = {**call.params, "model": call.model, "messages": call.messages, **fields}
        try:
            stream = await self._open().post(
                "/chat/completions",
                body=body,
                cast_to=object,
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
        except openai.APIError as error:
            raise _failure(error) from error
        response = stream.response
        source: _Body = response.extensions["body"]
        decoder = ChunkDecoder()
        try:
            while data := await source.read():
                if pieces := decoder.feed(data):
                    yield pieces
                if decoder.failure is not None:
                    raise decoder.failure
                if decoder.done:
                    break
            else:
                if pieces := decoder.eof():
                    yield pieces
                if decoder.failure is not None:
                    raise decoder.failure
        except aiohttp.ClientError as error:
            raise UpstreamError("upstream_cut", "the model's connection was cut") from error
        finally:
            if decoder.done and not source.at_eof:
                task = asyncio.create_task(source.drain())
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)
            else:
                await response.aclose()

    async def close(self) -> None:
        """See ModelSource.close."""
        if self._session is not None:
            await self._session.close()


class _Transport(httpx2.AsyncBaseTransport):
    """httpx2's requests over an aiohttp session."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        headers = request.headers
        # What comes back is read raw, so no encoding is asked for; aiohttp undoes one all the same.
        headers["accept-encoding"] = "identity"
        try:
            response = await self._session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=headers.multi_items(),
                data=await request.aread(),
                allow_redirects=False,
            )
        except aiohttp.ConnectionTimeoutError as error:
            raise httpx2.ConnectTimeout(str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise httpx2.ConnectError(str(error)) from error
        body = _Body(response)
        return httpx2.Response(
            response.status,
            headers=[(k, v) for k, v in response.raw_headers if k.lower() != b"content-encoding"],
            stream=body,
            extensions={"body": body},
        )


class _Body(httpx2.AsyncByteStream):
    """A response body that is read only while somebody asks for it.

    Between two reads the socket rests, so that the next read hands over all that came meanwhile:
    one recv and one wake-up instead of one a token.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._resting: asyncio.Transport | None = None

    @property
    def at_eof(self) -> bool:
        return self._response.content.at_eof()

    async def read(self) -> bytes:
        """What the socket gave; b"" at the end. Raises aiohttp.ClientError where it was cut."""
        if self._resting is not None:
            self._resting.resume_reading()
            self._resting = None
        data = await self._response.content.readany()
        connection = self._response.connection  # None once the end has come
        if connection is not None and connection.transport is not None:
            self._resting = connection.transport
            self._resting.pause_reading()
        return data

    async def drain(self) -> None:
        """Reads to the end, for a second at most, then gives the connection back or closes it."""
        try:
            async with asyncio.timeout(DRAIN):
                while await self.read():
                    pass
        except (TimeoutError, aiohttp.ClientError):
            pass
        finally:
            await self.aclose()

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        # The SDK reads the body of an error through this.
        try:
            while data := await self.read():
                yield data
        except aiohttp.ClientError as error:
            raise httpx2.ReadError(str(error)) from error

    async def aclose(self) -> None:
        self._response.close()  # no wait: the socket closes now; after the end it does nothing


class ChunkDecoder:
    """Bytes of a streamed chat completion to pieces, whatever the boundaries between reads.

    A line ends with LF or CRLF; only `data:` and `event: error` mean something. `done`: `[DONE]`
    has come. `failure`: what went wrong, after the pieces that came before it. An ending without a
    finish reason is a failure.
    """

    def __init__(self) -> None:
        self.done = False
        self.failure: UpstreamError | None = None
        self._unfinished: list[bytes] = []  # a line that has not ended, in parts
        self._unfinished_bytes = 0
        self._pending = b""  # data lines that are no JSON so far: an event may have several
        self._error_event = False
        self._finished = False

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces that these bytes complete. Never raises; see `failure`."""
        if b"\n" not in data:
            self._unfinished.append(data)
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > LINE_BYTES:
                self.failure = UpstreamError("upstream_invalid", "the model sent an endless line")
            return []
        lines = data.split(b"\n")
        if self._unfinished:
            lines[0] = b"".join((*self._unfinished, lines[0]))
        last = lines.pop()
        self._unfinished = [last] if last else []
        self._unfinished_bytes = len(last)
        return self._decode(lines)

    def eof(self) -> list[Piece]:
        """The pieces of a last line that did not end."""
        pieces = self._decode([b"".join(self._unfinished), b""])
        if self.failure is None and not self._finished and not self.done:
            self.failure = UpstreamError(
                "upstream_cut", "the model's answer ended without a finish reason"
            )
        return pieces

    def _decode(self, lines: list[bytes]) -> list[Piece]:
        pieces: list[Piece] = []
        text: list[str] = []  # adjacent plain text, the common case, joined once
        try:
            for line in lines:
                if line[:5] == b"data:":
                    payload = line[5:].strip()
                    if payload == b"[DONE]":
                        self.done = True
                        break
                    if self._pending:
                        payload = self._pending + b"\n" + payload
                    try:
                        chunk = orjson.loads(payload)
                    except orjson.JSONDecodeError:
                        self._pending = payload
                        continue
                    self._pending = b""
                    content = None if self._error_event else _plain(chunk)
                    if content is not None:
                        text.append(content)
                        continue
                    if text:
                        pieces.append(Piece("text", "".join(text)))
                        text.clear()
                    self._chunk(chunk, pieces)
                elif line[:6] == b"event:":
                    self._error_event = line[6:].strip() == b"error"
                elif not line or line == b"\r":
                    if self._pending:
                        raise ValueError(self._pending[:100])
                    self._error_event = False
        except UpstreamError as failure:
            self.failure = failure
        except (AttributeError, KeyError, LookupError, TypeError, ValueError):
            self.failure = UpstreamError("upstream_invalid", "the model sent what is no chunk")
        if text:
            pieces.append(Piece("text", "".join(text)))
        if self.done and not self._finished and self.failure is None:
            self.failure = UpstreamError(
                "upstream_cut", "the model's answer ended without a finish reason"
            )
        return pieces

    def _chunk(self, chunk: JSON, pieces: list[Piece]) -> None:
        error = chunk.get("error") or (self._error_event and chunk)
        if error:
            raise _error_event(error)
        for choice in chunk.get("choices") or ():
            index = choice.get("index") or 0
            delta = dict(choice.get("delta") or choice.get("message") or ())
            delta.pop("role", None)
            thought = delta.pop("reasoning_content", None) or delta.pop("reasoning", None)
            if thought:
                pieces.append(Piece("reasoning", thought, index))
            delta.pop("reasoning", None)
            if refusal := delta.pop("refusal", None):
                pieces.append(Piece("refusal", refusal, index))
            content = delta.pop("content", None) or ""
            if not isinstance(content, str):  # a list of parts, as some upstreams send
                content = "".join(part.get("text") or "" for part in content)
            calls = delta.pop("tool_calls", None) or ()
            extra = {name: value for name, value in delta.items() if value is not None}
            if choice.get("logprobs"):
                extra["logprobs"] = choice["logprobs"]
            if content or extra:
                pieces.append(Piece("text", content, index, extra=extra or None))
            for place, call in enumerate(calls):
                pieces.append(_tool_call(call, place, index))
            if reason := choice.get("finish_reason"):
                self._finished = True
                pieces.append(Piece("finish", str(reason), index))
        if usage := chunk.get("usage"):
            pieces.append(Piece("usage", extra=dict(usage)))


def _plain(chunk: Any) -> str | None:
    """The text of a chunk that is nothing but text of the first choice, as nearly all are."""
    try:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        content = delta["content"]
    except (KeyError, TypeError, ValueError):
        return None
    if (
        len(delta) > 1
        or type(content) is not str
        or choice.get("finish_reason")
        or choice.get("index")
        or choice.get("logprobs")
        or chunk.get("usage")
        or chunk.get("error")
    ):
        return None
    return content


def _tool_call(call: JSON, place: int, choice: int) -> Piece:
    function = call.get("function") or {}
    arguments = function.get("arguments") or ""
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    index = call.get("index")
    return Piece(
        "tool_call",
        arguments,
        choice,
        place=place if index is None else int(index),
        id=call.get("id") or "",
        name=function.get("name") or "",
    )


def _error_event(error: Any) -> UpstreamError:
    message, code = str(error), ""
    if isinstance(error, dict):
        message = str(error.get("message") or error)
        code = f"{error.get('code')} {error.get('type')}"
    limited = "429" in code or "rate_limit" in code
    name = "upstream_rate_limited" if limited else "upstream_failed"
    return UpstreamError(name, message[:MESSAGE_CHARS])


def _failure(error: openai.APIError) -> UpstreamError:
    """What the SDK raised, as an error of ours. The message of a refused key is not passed on."""
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        message = str(body.get("message") or error.message)[:MESSAGE_CHARS]
        param = body.get("param") if isinstance(body.get("param"), str) else None
        if status == 429:
            wait = _retry_after(error.response.headers.get("retry-after", ""))
            return UpstreamError(
                "upstream_rate_limited", message, retry_after=wait, upstream_status=status
            )
        if status in (401, 403):
            refused = "the model's server refused our credentials"
            return UpstreamError("upstream_unauthorized", refused, upstream_status=status)
        if status in (408, 409) or status >= 500:
            wait = _retry_after(error.response.headers.get("retry-after", ""))
            return UpstreamError(
                "upstream_failed", message, retry_after=wait, upstream_status=status
            )
        rejected = status if 400 <= status < 500 else 502
        return UpstreamError(
            "upstream_rejected", message, param=param, status=rejected, upstream_status=status
        )
    if isinstance(error, openai.APITimeoutError):
        return UpstreamError("connect_timeout", "the model's server could not be reached in time")
    return UpstreamError("upstream_unreachable", "the model's server could not be reached")


def _retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header; its date form is rare in this field and not read."""
    try:
        return min(max(float(text), 0.0), 86400.0)
    except ValueError:
        return None
