"""Browsers: `EventSource`, fetch-event-source and `fetch()` in Chromium, `eventsource` in Node.js.

Cuts are made by a front between browser and server, which also remembers what was asked. Each cut
must be followed by a reconnect that resumes: the exact text once, and one model call only.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import aiohttp

from tests.behaviour import answer, expected
from tests.browser import Browser
from tests.front import Front
from tests.js import run_js
from tests.processes import Server, UpstreamProcess
from tests.readers import DataBlocks, Ndjson

PROMPT = "what is a river?"
StartFront = Callable[[str], Awaitable[Front]]

# Listens until the source has closed itself; gives the messages, and how often it was opened.
EVENT_SOURCE = """
const listen = (path, events) => new Promise((resolve) => {
  const got = {messages: [], opens: 0};
  const source = new EventSource(path);
  const take = (e) => {
    got.messages.push({event: e.type, data: e.data, id: e.lastEventId});
    heard(e.lastEventId);
  };
  for (const name of ["message", ...events]) source.addEventListener(name, take);
  source.onopen = () => (got.opens += 1);
  source.onerror = () => source.readyState === EventSource.CLOSED && resolve(got);
});
return Promise.all(given.sources.map(([path, events]) => listen(path, events)));
"""


def tokens(start: int, stop: int | None = None) -> bytes:
    """What the upstream says from one token to another; without an end, that one."""
    return "".join(answer(PROMPT, 400)[start : stop or start + 1]).encode()


def stream_path(model: str) -> str:
    return "/stream?" + urlencode({"prompt": PROMPT, "model": model})


def parsed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data of the messages that have JSON."""
    return [json.loads(m["data"]) for m in messages if m["data"] != "[DONE]"]


# Sends its POST again after a cut, as the package does, only sooner; gives the messages.
FETCH_EVENT_SOURCE = """
const got = {messages: [], opens: 0, errors: []};
await fetchEventSource(given.path, {
  method: "POST",
  headers: {"Content-Type": "application/json"},
  body: JSON.stringify(given.body),
  openWhenHidden: true,
  onopen: async (response) => {
    const type = response.headers.get("content-type") ?? "";
    if (!type.startsWith("text/event-stream")) throw new Error(`content type ${type}`);
    got.opens += 1;
  },
  onmessage: (m) => {
    if (m.data) got.messages.push({event: m.event, data: m.data, id: m.id});
    heard(m.id);
  },
  onerror: (e) => {
    if (got.errors.push(String(e)) > 9) throw e;
    return 50;
  },
});
return got;
"""

# Reads a POST's answer as it comes; gives the pieces, how it ended, and its stream id.
FETCH = """
const response = await fetch(given.path, {
  method: "POST",
  headers: {"Content-Type": "application/json", "Accept": given.accept},
  body: JSON.stringify(given.body),
});
const got = {status: response.status, pieces: [], error: null};
got.type = response.headers.get("content-type");
got.stream_id = response.headers.get("x-stream-id");
const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
try {
  for (;;) {
    const {done, value} = await reader.read();
    if (done) break;
    got.pieces.push(value);
  }
} catch (e) {
  got.error = e.name;
}
return got;
"""


async def test_event_source_resumes_by_itself(
    browser: Browser, front: StartFront, relay_server: Server, upstream: UpstreamProcess
) -> None:
    """`GET /stream`, cut twice inside a frame: the browser asks again with its last id, gets the
    exact text once, and is stopped by 204. The model is called once.
    """
    model = "up:id=es-cut,tokens=100,rate=200"
    path, before = stream_path(model), await front(relay_server.url)
    before.cut(path, tokens(20), tokens(60), rst=True, heard=True)
    (got,) = await browser.run(before, EVENT_SOURCE, sources=[[path, []]])
    assert "".join(m["content"] for m in parsed(got["messages"])) == expected(model, PROMPT)
    first, *again = before.to(path)
    assert first.headers["accept"] == "text/event-stream"
    assert "last-event-id" not in first.headers
    assert len(again) == 3
    assert all("last-event-id" in asked.headers for asked in again)
    assert again[-1].response.startswith(b"HTTP/1.1 204 ")
    assert got["opens"] == 3
    assert len(upstream.log(model)) == 1


async def test_event_source_repeats_one_delta_at_most(
    browser: Browser, front: StartFront, relay_server: Server, upstream: UpstreamProcess
) -> None:
    """Cut between a delta and its id, which dialect *content* sends after it, that delta comes
    again, and nothing else does. A failed answer's error comes once, and is not asked for again.
    """
    model, failing = "up:id=es-between,tokens=40,rate=100", "up:id=es-fails,tokens=20,error_event"
    path, failing_path = stream_path(model), stream_path(failing)
    before = await front(relay_server.url)
    before.cut(path, b'"}\n\n', heard=True)
    sources = [[path, []], [failing_path, []]]
    cut, failed = await browser.run(before, EVENT_SOURCE, sources=sources)
    deltas = [message["content"] for message in parsed(cut["messages"])]
    assert "".join(deltas) == deltas[0] + expected(model, PROMPT)
    *content, error = parsed(failed["messages"])
    assert "".join(each["content"] for each in content).encode() == tokens(0, 10)
    assert error["code"] == "upstream_failed"
    for each in (path, failing_path):
        assert before.to(each)[-1].response.startswith(b"HTTP/1.1 204 ")
    assert len(upstream.log(model)) == len(upstream.log(failing)) == 1


async def test_event_source_in_every_dialect(
    browser: Browser,
    front: StartFront,
    relay_server: Server,
    http: aiohttp.ClientSession,
    upstream: UpstreamProcess,
) -> None:
    """Attached to one running answer as *chat*, *tool* and *native* and to the counter, each cut
    inside a frame and resumed: every source has every event once, with rising ids.
    """
    model = "up:id=es-dialects,tokens=100,rate=50"
    body = {"message": PROMPT, "model": model}
    async with http.post(f"{relay_server.url}/api/chat/stream", json=body) as answer:
        stream_id = answer.headers["X-Stream-Id"]
    before = await front(relay_server.url)
    events = f"/api/v1/streams/{stream_id}/events?dialect="
    natives = ["started", "part_started", "delta", "part_finished", "finished"]
    sources: list[tuple[str, list[str]]] = [
        (events + "chat", []),
        (events + "tool", []),
        (events + "native", natives),
        ("/api/stream?count=20&interval=0.05", []),
    ]
    for path, _ in sources[:3]:
        before.cut(path, tokens(20), rst=True, heard=True)
    before.cut("/api/stream", b'"Message 7"', heard=True)
    chat, tool, native, count = await browser.run(before, EVENT_SOURCE, sources=sources)
    whole = expected(model, PROMPT)
    chats, tools, counts = (parsed(each["messages"]) for each in (chat, tool, count))
    assert [chats[0]["type"], chats[-1]["type"]] == ["start", "end"]
    assert "".join(m["content"] for m in chats) == whole
    assert tools[-1]["type"] == "done"
    assert "".join(m["content"] for m in tools[:-1]) == whole
    names = [message["event"] for message in native["messages"]]
    assert [name for name in names if name != "delta"] == [n for n in natives if n != "delta"]
    said = [m["data"]["content"] for m in parsed(native["messages"]) if m["type"] == "delta"]
    assert "".join(said) == whole
    ids = [int(message["id"].rpartition("-")[2]) for message in native["messages"]]
    assert ids == sorted(set(ids))
    wanted = [f"Message {i}" for i in range(1, 21)]
    assert [m.get("content") for m in counts] == [None, *wanted, None]
    for path, _ in sources:
        assert len(before.to(path)) == 3
        assert before.to(path)[-1].response.startswith(b"HTTP/1.1 204 ")
    assert len(upstream.log(model)) == 1


async def test_fetch_event_source_never_starts_a_second_answer(
    browser: Browser, front: StartFront, relay_server: Server, upstream: UpstreamProcess
) -> None:
    """`POST /api/chat/stream`, cut twice after a chunk and once after the end: the same POST comes
    again with `last-event-id` and is answered from there. The text is exact, the answer to what is
    over has the type that the package insists on, and the model is called once.
    """
    model = "up:id=fes-cut,tokens=60,rate=100"
    before, path = await front(relay_server.url), "/api/chat/stream"
    after_chunk, after_end = b'"metadata":{"model":"%b"}}\n\n' % model.encode(), b"}}}\n\n"
    before.cut(path, after_chunk, after_chunk, after_end, heard=True)
    body = {"message": PROMPT, "model": model, "conversation_id": "c-fes"}
    got = await browser.run(before, FETCH_EVENT_SOURCE, path=path, body=body)
    messages = parsed(got["messages"])
    assert "".join(message["content"] for message in messages) == expected(model, PROMPT)
    assert [m["type"] for m in messages if m["type"] != "chunk"] == ["start", "end"]
    assert got["opens"] == len(before.to(path)) == 4
    assert all("last-event-id" in asked.headers for asked in before.to(path)[1:])
    assert {asked.method for asked in before.to(path)} == {"POST"}
    assert len(upstream.log(model)) == 1


async def test_fetch_event_source_cut_anywhere(
    browser: Browser, front: StartFront, relay_server: Server, upstream: UpstreamProcess
) -> None:
    """Cut inside frames it still gets one answer, with nothing doubled or moved. (It takes an id
    at its line, so that it never sees the frame that was cut.)
    """
    model = "up:id=fes-anywhere,tokens=100,rate=100"
    before, path = await front(relay_server.url), "/api/chat/stream"
    before.cut(path, tokens(20), tokens(50), tokens(80), heard=True)
    body = {"message": PROMPT, "model": model}
    got = await browser.run(before, FETCH_EVENT_SOURCE, path=path, body=body)
    messages = parsed(got["messages"])
    said = "".join(message["content"] for message in messages).split()
    missing = [token for token in expected(model, PROMPT).split() if token not in said]
    assert [t for t in expected(model, PROMPT).split() if t not in missing] == said
    assert len(said) > 50
    assert messages[-1]["type"] == "end"
    assert len(before.to(path)) == 4
    assert len(upstream.log(model)) == 1


async def test_fetch_reads_an_answer_as_it_comes(
    browser: Browser, front: StartFront, relay_server: Server
) -> None:
    """`POST /api/v1/ai/generate/stream` by `fetch()`, in SSE and in NDJSON: many pieces, the exact
    text, and in SSE `[DONE]`.
    """
    before, path = await front(relay_server.url), "/api/v1/ai/generate/stream"
    model = "up:tokens=50,rate=100,u2028"
    for accept, parser in (("text/event-stream", DataBlocks()), ("application/x-ndjson", Ndjson())):
        body = {"prompt": PROMPT, "model": model}
        got = await browser.run(before, FETCH, path=path, body=body, accept=accept)
        assert (got["status"], got["error"]) == (200, None)
        assert got["type"].startswith(accept)
        assert len(got["pieces"]) > 5
        items: list[Any] = parser.feed("".join(got["pieces"]).encode())
        if accept == "text/event-stream":
            assert items.pop() == "[DONE]"
            items = [json.loads(item) for item in items]
        assert "".join(item["content"] for item in items) == expected(model, PROMPT)


async def test_fetch_sees_that_a_text_is_cut(
    browser: Browser, front: StartFront, relay_server: Server
) -> None:
    """Bare text has no word for a failure: the browser's read is rejected, and the page has what
    its browser gave it until then."""
    before, path = await front(relay_server.url), "/api/v1/ai/generate/stream"
    body = {"prompt": PROMPT, "model": "up:tokens=20,error_event"}
    got = await browser.run(before, FETCH, path=path, body=body, accept="text/plain")
    assert got["status"] == 200
    assert got["error"] == "TypeError"
    assert tokens(0, 10).startswith("".join(got["pieces"]).encode())


async def test_eventsource_in_node_resumes_by_itself(
    front: StartFront,
    relay_server: Server,
    http: aiohttp.ClientSession,
    upstream: UpstreamProcess,
) -> None:
    """The npm package does as the browsers do: exact text, stopped by 204, one model call. (It
    takes no id from a block of its own, so that it cannot resume dialect *content*.)
    """
    model = "up:id=es-node,tokens=100,rate=100"
    body = {"message": PROMPT, "model": model}
    async with http.post(f"{relay_server.url}/api/chat/stream", json=body) as answer:
        stream_id = answer.headers["X-Stream-Id"]
    before, path = await front(relay_server.url), f"/api/v1/streams/{stream_id}/events?dialect=chat"
    before.cut(path, tokens(20), rst=True)
    got = await run_js("eventsource.mjs", before.url + path, {})
    assert "".join(m["content"] for m in parsed(got["messages"])) == expected(model, PROMPT)
    assert got["ended"] == "closed"
    assert got["errors"][-1]["code"] == 204
    assert len(before.to(path)) == 3
    assert len(upstream.log(model)) == 1
