"""The OpenAI-compatible upstream: a model call over HTTP, its answer decoded as it streams.

The SDK says where the upstream is and how to authenticate. The call itself is aiohttp's, and each
`data:` line is decoded once with orjson: the SDK's own way costs 1 to 3 ms a request, 80 us a chunk
for its transport and 200 us more for its typed chunks. Retries are the generation's: some failures
come after the status and before the first token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx2
import openai
import orjson
from multidict import istr
from yarl import URL

from streaming.decoder import ChunkDecoder, shown
from streaming.errors import UpstreamError
from streaming.models import ModelCall, Piece

DRAIN = 1.0  # seconds for the last bytes after [DONE], so that the connection can serve again
ERROR_BYTES = 65536  # of an error's body that are looked at
REST_EVENTS = 2  # in one read: what comes faster than that is worth letting gather
KEEPALIVE = 60.0  # seconds that an idle connection is kept: a TLS handshake spared in a first token


class OpenAIUpstream:
    """One upstream, one pool of connections, any number of calls at once.

    name: see ModelSource. base_url: ends in `/v1` as OpenAI's does; "" is OpenAI itself.
    connect_timeout in seconds; the waits after it are the generation's to limit.
    """

    def __init__(self, name: str, base_url: str, api_key: str, connect_timeout: float) -> None:
        self.name = name
        sdk = openai.AsyncOpenAI(
            base_url=base_url or "https://api.openai.com/v1",
            # An upstream without keys gets a word in its place: the SDK insists on one.
            api_key=api_key or "none",
            http_client=httpx2.AsyncClient(transport=httpx2.AsyncBaseTransport()),  # not for use
        )
        headers = {**sdk.default_headers, **sdk.auth_headers}
        # As aiohttp folds names of headers: what is folded already is not copied for each call.
        self._headers = {istr(k): v for k, v in headers.items() if isinstance(v, str)}
        self._url = URL(f"{sdk.base_url}chat/completions", encoded=True)
        self._connect_timeout = connect_timeout
        self._opened: aiohttp.ClientSession | None = None
        self._draining: set[asyncio.Task[None]] = set()

    def _session(self) -> aiohttp.ClientSession:
        # Not before the first call: a session belongs to the loop that runs.
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE),
                cookie_jar=aiohttp.DummyCookieJar(),  # one tenant's cookie is not another's
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout),
                headers={**self._headers, aiohttp.hdrs.ACCEPT_ENCODING: "identity"},
                proxy=_proxy(self._url),
            )
        return self._opened

    async def stream(self, call: ModelCall) -> AsyncGenerator[list[Piece], None]:
        """See ModelSource.stream."""
        try:
            response = await self._session().post(
                self._url, data=_request(call), headers=call.headers, allow_redirects=False
            )
        except aiohttp.ConnectionTimeoutError as error:
            late = "the model's server could not be reached in time"
            raise UpstreamError("connect_timeout", late) from error
        except (aiohttp.ClientError, OSError) as error:
            unreachable = "the model's server could not be reached"
            raise UpstreamError("upstream_unreachable", unreachable) from error
        if response.status != 200:
            raise await _refused(response)
        source = _Body(response)
        decoder = ChunkDecoder()
        try:
            ended = False
            while not (ended or decoder.done):
                data = await source.read()
                ended = not data
                pieces = decoder.eof() if ended else decoder.feed(data)
                del data  # up to 64 KiB, while the consumer takes its time
                if pieces:
                    yield pieces
                del pieces
                if decoder.failure is not None:
                    raise decoder.failure
            if not decoder.finished:
                ended_early = "the model's answer ended without a finish reason"
                raise UpstreamError("upstream_cut", ended_early)
        except aiohttp.ClientError as error:
            raise UpstreamError("upstream_cut", "the model's connection was cut") from error
        finally:
            if decoder.done and not source.at_eof:
                task = asyncio.create_task(source.drain())
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)
            else:
                source.close()

    async def close(self) -> None:
        """See ModelSource.close."""
        if self._opened is not None:
            await self._opened.close()


class _Body:
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
            self.close()

    def close(self) -> None:
        """Closes the socket now; after the end of the body it does nothing."""
        self._response.close()


def _request(call: ModelCall) -> bytes:
    options = {**(call.params.get("stream_options") or {}), "include_usage": True}
    fields = {"stream": True, "stream_options": options}
    return orjson.dumps({**call.params, "model": call.model, "messages": call.messages, **fields})


def _proxy(url: URL) -> str | None:
    """The proxy that the environment names for this URL. Asked once: aiohttp's own `trust_env`
    reads files in a thread at every call, which costs more than the rest of it.
    """
    if proxy_bypass(url.host or ""):
        return None
    return getproxies().get(url.scheme)


async def _refused(response: aiohttp.ClientResponse) -> UpstreamError:
    body = b""
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):  # the status says enough
        async with asyncio.timeout(DRAIN):
            while len(body) < ERROR_BYTES and (data := await response.content.readany()):
                body += data
    response.close()
    return refusal(response.status, body, response.headers.get("Retry-After", ""))


def refusal(status: int, body: bytes, retry_after: str) -> UpstreamError:
    """What a status other than 200 means. The message of a refused key is not passed on."""
    error: Any = None
    with contextlib.suppress(ValueError, LookupError, TypeError):
        error = orjson.loads(body)["error"]
    fields = error if isinstance(error, dict) else {}
    message = shown(fields.get("message") or f"the model's server answered {status}")
    if status == 429 or status in (408, 409) or status >= 500:
        code = "upstream_rate_limited" if status == 429 else "upstream_failed"
        wait = _retry_after(retry_after)
        return UpstreamError(code, message, retry_after=wait, upstream_status=status)
    if status in (401, 403):
        refused = "the model's server refused our credentials"
        return UpstreamError("upstream_unauthorized", refused, upstream_status=status)
    param, rejected = fields.get("param"), status if status >= 400 else 502
    param = shown(param) if isinstance(param, str) else None
    return UpstreamError(
        "upstream_rejected", message, param=param, status=rejected, upstream_status=status
    )


def _retry_after(text: str) -> float | None:
    """Seconds of a Retry-After header; its date form is rare in this field and not read."""
    try:
        return min(max(0.0, float(text)), 86400.0)  # in this order NaN is 0
    except ValueError:
        return None
