"""Naive clients: each endpoint, read the way such clients read, whatever the answer holds.

They look for lines, for blocks or for braces and know nothing of the rest of a framing. The answer
is made to deceive them: braces, quotes, blank lines, and lines that look like the framing itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.clients import DIALECTS, DONE, MEDIA, Kind, named, text_of
from tests.endpoints import ENDPOINTS, GETS, Endpoint, asking, url_of
from tests.processes import Server, UpstreamProcess
from tests.readers import Braces, DataBlocks, DataLines, Message, Ndjson, Sse, Text, ask

DECEIVING = (
    'void f() { if (x) { return "}"; } } // {"content":"}"}\n\ndata: {"content":"no"}\n\n'
    "id: 7\nevent: done\ndata: [DONE]\n\n: a comment\r\n\r\n```js\nlet o = {}, s = `${o}`\n```\n\n"
    "a \u2028 b \u2029 c \u0085 d \u000b e \u0000 f \\u007d g \U0001f30a{{{}}}"
)
ECHO = "up:echo=3,rate=600"  # says the prompt itself, three characters a token

each_endpoint = pytest.mark.parametrize("endpoint", ENDPOINTS, ids=str)
CONTENT = [endpoint for endpoint in ENDPOINTS if endpoint.dialect == "content"]


def said(endpoint: Endpoint, datas: list[str]) -> str:
    """The text in the data of an event stream."""
    items = [DONE if data == DONE else json.loads(data) for data in datas]
    assert DONE not in items[:-1]
    return "".join(text_of(Kind(endpoint.dialect), item) for item in items)


@each_endpoint
async def test_line_by_line(relay_server: Server, endpoint: Endpoint) -> None:
    """`line.startswith("data: ")` finds every object whole, and the text of all is the answer."""
    async with asking(
        relay_server.url, endpoint, DECEIVING, query={"format": "sse"}, model=ECHO
    ) as answer:
        datas = await answer.read(DataLines())
    assert said(endpoint, datas) == DECEIVING
    assert (datas[-1] == DONE) is endpoint.done


@pytest.mark.parametrize("endpoint", CONTENT, ids=str)
async def test_block_by_block(relay_server: Server, endpoint: Endpoint) -> None:
    """In *content* each block with data is one bare `data: ` line; ids have blocks of their own."""
    async with asking(
        relay_server.url, endpoint, DECEIVING, query={"format": "sse"}, model=ECHO
    ) as answer:
        datas = await answer.read(DataBlocks())
    assert said(endpoint, datas) == DECEIVING


@each_endpoint
async def test_one_object_a_line(relay_server: Server, endpoint: Endpoint) -> None:
    """NDJSON is one object a line, with no blank line and no other."""
    async with asking(
        relay_server.url, endpoint, DECEIVING, query={"format": "ndjson"}, model=ECHO
    ) as answer:
        items = await answer.read(Ndjson())
    kind = Kind(endpoint.dialect, "ndjson")
    assert "".join(text_of(kind, item) for item in items) == DECEIVING


@pytest.mark.parametrize("http", ["1.1", "1.0"])
async def test_object_by_brace(relay_server: Server, http: str) -> None:
    """`GET /chat` is read up to each `}`, which ends an object: inside strings it is `\\u007d`."""
    query = {"prompt": DECEIVING, "model": ECHO}
    async with ask("GET", url_of(relay_server.url, "/chat", **query), http=http) as answer:
        stream_id, items = answer.headers["x-stream-id"], await answer.read(Braces())
    assert "".join(item["content"] for item in items) == DECEIVING
    # Resumed, and where it fails, it is the same.
    again = url_of(relay_server.url, "/chat", last_event_id=f"{stream_id}-1")
    async with ask("GET", again) as answer:
        items = await answer.read(Braces())
    assert "".join(item["content"] for item in items) == DECEIVING
    query["model"] = "up:echo=3,error_event=2"
    async with ask("GET", url_of(relay_server.url, "/chat", **query)) as answer:
        *items, failure = await answer.read(Braces())
    assert "".join(item["content"] for item in items) == DECEIVING[:6]
    assert failure["code"] == "upstream_failed"


@each_endpoint
async def test_nothing_but_text(relay_server: Server, endpoint: Endpoint) -> None:
    """As plain text the body is the answer, byte for byte."""
    async with asking(
        relay_server.url, endpoint, DECEIVING, query={"format": "text"}, model=ECHO
    ) as answer:
        assert (await answer.body()).decode() == DECEIVING


@pytest.fixture(scope="module")
def restless(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamProcess
) -> Iterator[Server]:
    """A server whose streams get a heartbeat after 50 ms of silence."""
    config = {
        "model": {"name": "up:", "base_url": upstream.base},
        "delivery": {"heartbeat": 0.05},
    }
    process = Server(tmp_path_factory.mktemp("restless"), config)
    yield process
    process.stop()


HALTING = "up:echo=100,rate=5"  # a few tokens, with heartbeats between them


@each_endpoint
async def test_heartbeats_do_not_disturb(restless: Server, endpoint: Endpoint) -> None:
    """A slow answer reads the same in every framing; only SSE carries heartbeats, as comments."""
    readers: dict[str, Callable[[], Any]] = {"sse": DataLines, "ndjson": Ndjson, "text": Text}
    for framing, reader in readers.items():
        async with asking(
            restless.url, endpoint, DECEIVING, query={"format": framing}, model=HALTING
        ) as answer:
            body = await answer.body()
        items = reader().feed(body)
        if framing == "sse":
            assert said(endpoint, items) == DECEIVING
        else:
            kind = Kind(endpoint.dialect, framing)
            assert "".join(text_of(kind, item) for item in items) == DECEIVING
        assert (b": heartbeat\n\n" in body) is (framing == "sse")
        if framing == "sse" and endpoint.dialect == "content":
            assert said(endpoint, DataBlocks().feed(body)) == DECEIVING


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_heartbeats_with_a_name(restless: Server, dialect: str) -> None:
    """`heartbeat=NAME` makes them events that JavaScript sees: in SSE by that name, in NDJSON an
    object of that type. Text has no room for them.
    """

    async def read(framing: str, wish: str) -> bytes:
        query = {"dialect": dialect, "format": framing, "heartbeat": wish}
        async with ask("GET", url_of(restless.url, path, **query)) as reader:
            return await reader.body()

    async with asking(restless.url, ENDPOINTS[3], DECEIVING, model=HALTING) as answer:
        path = f"/api/v1/streams/{answer.headers['x-stream-id']}/events"
        sse, ndjson, text = await asyncio.gather(
            read("sse", "1"), read("ndjson", "ping"), read("text", "ping")
        )
    messages = [m.json() for m in Sse().feed(sse) if m.event == "heartbeat"]
    objects = [item for item in Ndjson().feed(ndjson) if item.get("type") == "ping"]
    assert messages
    assert objects
    assert all(isinstance(item.pop("timestamp"), int) for item in messages + objects)
    assert messages[0] == {}
    assert objects[0] == {"type": "ping"}
    assert b"\n: heartbeat" not in sse
    assert text.decode() == DECEIVING


class EventSource:
    """What `EventSource` does (HTML standard, 9.2): comes back to the same URL after every end with
    the last id it has seen, until it is told 204. Any other status fails it for good.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.last_event_id = ""
        self.messages: list[Message] = []
        self.connections = 0

    async def run(self, *cuts: int) -> None:
        """Until 204. Connection n is cut right after so many blocks as `cuts[n]` says."""
        planned = list(cuts)
        while await self._connect(planned.pop(0) if planned else 0):
            pass

    async def _connect(self, cut: int) -> bool:
        self.connections += 1
        headers = {"Accept": MEDIA["sse"], "Cache-Control": "no-cache"}
        if self.last_event_id:
            headers["Last-Event-ID"] = self.last_event_id
        async with ask("GET", self.url, headers=headers) as answer:
            if answer.status == 204:
                return False
            assert (answer.status, answer.headers["content-type"]) == (200, MEDIA["sse"])
            parser, body = Sse(), b""
            async for piece in answer.pieces():
                body += piece
                if cut and body.count(b"\n\n") >= cut:
                    body = b"".join(block + b"\n\n" for block in body.split(b"\n\n")[:cut])
                    break
        self.messages += parser.feed(body)
        self.last_event_id = parser.last_event_id or self.last_event_id
        return True


@pytest.mark.parametrize("endpoint", GETS, ids=str)
async def test_event_source(
    relay_server: Server, upstream: UpstreamProcess, endpoint: Endpoint
) -> None:
    """It is cut, comes back by itself, and after the end comes back once more to be told 204. The
    text is exact and the model was asked once.
    """
    model = named("echo=5,rate=200")
    source = EventSource(url_of(relay_server.url, endpoint.path, prompt=DECEIVING, model=model))
    await source.run(4, 5)  # each right after an id
    assert said(endpoint, [message.data for message in source.messages]) == DECEIVING
    assert source.connections == 4
    assert len(upstream.log(model)) == 1


async def test_event_source_of_a_stream(relay_server: Server, upstream: UpstreamProcess) -> None:
    """The same on an address of one stream, where ids stand before the data: it hears every event
    once, by name. `starting_after` in its address does not move it back.
    """
    model = named("echo=5,rate=200")
    async with asking(relay_server.url, ENDPOINTS[3], DECEIVING, model=model) as answer:
        stream_id = answer.headers["x-stream-id"]
        path = f"/api/v1/streams/{stream_id}/events"
        source = EventSource(url_of(relay_server.url, path, starting_after=1))
        await source.run(4, 5)
    offsets = [int(message.id.rpartition("-")[2]) for message in source.messages]
    assert offsets == sorted(set(offsets))
    assert [m.event for m in source.messages].count("finished") == 1
    kind = Kind("native")
    assert "".join(text_of(kind, m.json()) for m in source.messages) == DECEIVING
    assert len(upstream.log(model)) == 1
