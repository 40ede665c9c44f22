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

from streaming.decoder import ChunkDecoder, shown
from streaming.errors import UpstreamError
from streaming.models import ModelCall, Piece

DRAIN = 1.0  # seconds for the last bytes after [DONE], so that the connection can serve again
READ_HEADERS = frozenset({b"content-type", b"retry-after", b"x-request-id"})
REST_EVENTS = 2  # in one read: what comes faster than that is worth letting gather
KEEPALIVE = 60.0  # seconds that an idle connection is kept: a TLS handshake spared in a first token


class OpenAIUpstream:
    """One upstream, one pool of connections, any number of calls at once.

    base_url: ends in `/v1` as OpenAI's does; "" is OpenAI itself. connect_timeout in seconds; the
    waits after it are the generation's to limit.
    """

    def __init__(self, base_url: str, api_key: str, connect_timeout: float) -> None:
        self._base_url = (base_url or "https://api.openai.com/v1").rstrip("/")
        self._url = f"{self._base_url}/chat/completions"
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
                http_client=_Client(self._session, httpx2.URL(self._url)),
            )
        return self._client

    async def stream(self, call: ModelCall) -> AsyncGenerator[list[Piece], None]:
        """See ModelSource.stream."""
        options = {**(call.params.get("stream_options") or {}), "include_usage": True}
        fields = {"stream": True, "stream_options": options}
        body = {**call.params, "model": call.model, "messages": call.messages, **fields}
        try:
            stream = await self._open().post(
                self._url,
                content=orjson.dumps(body),
                options={"idempotency_key": "unused"},  # else it makes a random one, and drops it
                cast_to=object,
                stream=True,
                stream_cls=openai.AsyncStream[object],
            )
        except openai.APIError as error:
            raise _failure(error) from error
        # Only the body is kept: request and response take 10 KiB as long as somebody holds them.
        source: _Body = stream.response.extensions["body"]
        del stream, body
        decoder = ChunkDecoder()
        try:
            while data := await source.read():
                pieces = decoder.feed(data)
                del data  # up to 64 KiB, while the consumer takes its time
                if pieces:
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
                await source.aclose()

    async def close(self) -> None:
        """See ModelSource.close."""
        if self._session is not None:
            await self._session.close()


class _Client(httpx2.AsyncClient):
    """The SDK's HTTP client, over an aiohttp session.

    Both methods are public, and overridden whole: httpx2's own merge each request with the client's
    settings, cookies, authentication and redirects, none of which are used here, and parse its URL
    and headers several times. With them a one-token answer costs a third more.
    """

    def __init__(self, session: aiohttp.ClientSession, url: httpx2.URL) -> None:
        super().__init__()
        self._aiohttp = session
        self._url = url
        self._yarl = URL(str(url), encoded=True)
        self._recent: list[tuple[str, str]] = []

    def build_request(self, method: str, url: httpx2.URL | str, **fields: Any) -> httpx2.Request:
        sent = {"headers": fields["headers"], "content": fields["content"]}
        return httpx2.Request(method, self._url, extensions=sent)  # one URL is all that is asked

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        sent = request.extensions
        # What comes back is read raw, so no encoding is asked for; aiohttp undoes one all the same.
        headers = [*sent["headers"], ("Accept-Encoding", "identity")]
        if headers == self._recent:
            headers = self._recent  # the same strings for every call: 1.5 KiB a stream
        self._recent = headers
        try:
            response = await self._aiohttp.post(
                self._yarl, headers=headers, data=sent["content"], allow_redirects=False
            )
        except aiohttp.ConnectionTimeoutError as error:
            raise httpx2.ConnectTimeout(str(error)) from error
        except (aiohttp.ClientError, OSError) as error:
            raise httpx2.ConnectError(str(error)) from error
        body = _Body(response)
        received = [(k, v) for k, v in response.raw_headers if k.lower() in READ_HEADERS]
        extensions = {"body": body}
        return httpx2.Response(
            response.status, headers=received, stream=body, request=request, extensions=extensions
        )


class _Body(httpx2.AsyncByteStream):
    """A response body that is read only while somebody asks for it.

    Where a read has brought several events, the socket then rests until the next: that hands over
    all that came meanwhile, in one recv instead of one an event. To stop and start a socket costs
    about as much as two recvs, so a slow stream is left alone.
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
        content = self._response.content
        try:
            data = await content.readany()
        except aiohttp.ClientError:
            # aiohttp tells of a cut before it hands over what came until then; that comes first
            # here. It has no public way to ask for it.
            data = content._read_nowait(-1)
            if not data:
                raise
        if data.count(b"\n\n") > REST_EVENTS:
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


def _failure(error: openai.APIError) -> UpstreamError:
    """What the SDK raised, as an error of ours. The message of a refused key is not passed on."""
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        message = shown(body.get("message") or error.message)
        param = shown(body["param"]) if isinstance(body.get("param"), str) else None
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
        return min(max(0.0, float(text)), 86400.0)  # in this order NaN is 0
    except ValueError:
        return None
