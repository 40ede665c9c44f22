"""Random cuts: a reader is cut again and again, in the middle of a line or between two, comes back
with the last whole event's id, and the text is exact: nothing lost, doubled or moved.

`SEED=...`, which a failure names, repeats a run as far as the network lets it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import secrets
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tests.clients import DONE, PROMPT, Kind, named, status, text_of
from tests.conftest import SOAK
from tests.endpoints import RESUMABLE, Endpoint, asking, resuming, url_of
from tests.processes import Server, UpstreamProcess
from tests.readers import Answer, Ndjson, Sse, ask
from tests.upstream import expected

SEED = os.environ.get("SEED") or secrets.token_hex(4)
ANSWERS = 400 if SOAK else 40  # a batch; about three cuts each
AT_ONCE = 20

EXACT = [Kind(dialect) for dialect in ("chat", "tool", "native")]
EXACT += [Kind(dialect, "ndjson") for dialect in ("content", "chat", "tool", "native")]
LOOSE = Kind("content")  # over SSE
STREAM = Endpoint("POST", "/stream", "prompt", "content")
CUT_AFTER = (40, 200, 800, 3000, 12_000)  # bytes at most, body only
MARKED = (
    "Look:\n\n```js\nlet a = `}`;\n```\n\n"
    "| a | b |\n|---|---|\n| 1 | \u2028 |\n\n![x](y:z) \U0001f30a"
)


class Story:
    """One answer, and the client that reads it in pieces.

    taken: what it took, `(offset, text)` of each object with a position. cuts: so far.
    """

    def __init__(self, url: str, model: str, prompt: str, text: str, seed: str) -> None:
        self.url, self.model, self.prompt, self.text = url, model, prompt, text
        self.seed, self.chance = seed, random.Random(seed)
        self.taken: list[tuple[int, str]] = []
        self.stream_id = self.position = ""
        self.cuts, self.most = 0, self.chance.randint(1, 6)
        self.trace: list[str] = []

    async def run(self) -> None:
        """Asks, reads, is cut and comes back until it has been told the end."""
        chance = self.chance
        self.kind = chance.choice(self.kinds)
        speaking = [e for e in RESUMABLE if e.dialect == self.kind.dialect]
        self.asked = chance.choice(speaking or list(RESUMABLE))
        over = False
        async with asking(
            self.url, self.asked, self.prompt, query={"format": self.kind.framing},
            model=self.model,
        ) as answer:  # fmt: skip
            self.stream_id = answer.headers["x-stream-id"]
            if chance.random() < 0.4:
                await answer.body()  # and now as somebody who comes late
            elif speaking:
                over = await self.read(answer, self.kind)
        while not over:
            over = await self.come_back()
        await self.check()

    @property
    def kinds(self) -> list[Kind]:
        return EXACT

    async def come_back(self) -> bool:
        """Reads on, mostly as the same kind of client; whether that was the end."""
        kind = self.kind if self.chance.random() < 0.6 else self.chance.choice(self.kinds)
        async with self.again(kind) as answer:
            return await self.read(answer, kind)

    def again(self, kind: Kind) -> AbstractAsyncContextManager[Answer]:
        """Comes back: to an endpoint that speaks this dialect, or to the stream's own address."""
        chance, query = self.chance, {"format": kind.framing}
        endpoints = [e for e in RESUMABLE if e.dialect == kind.dialect and self.speaks(e)]
        by, http = chance.choice(["header", "query"]), chance.choice(["1.1", "1.1", "1.0"])
        if self.position and endpoints and chance.random() < 0.5:
            endpoint = chance.choice(endpoints)
            body = chance.choice([b"", b"{", b'{"prompt":"another","message":"one"}'])
            return resuming(
                self.url, endpoint, self.position, by=by, query=query, http=http,
                body=body if endpoint.method == "POST" else b"",
            )  # fmt: skip
        path = f"/api/v1/streams/{self.stream_id}/events"
        query["dialect"] = kind.dialect
        if self.position and chance.random() < 0.7:
            events = Endpoint("GET", path, "", kind.dialect)
            return resuming(self.url, events, self.position, by=by, query=query, http=http)
        # A client that has no position yet begins anew.
        after = self.position or "0"
        after = after.rpartition("-")[2] if chance.random() < 0.5 else after
        return ask("GET", url_of(self.url, path, starting_after=after, **query), http=http)

    def speaks(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint goes on in its dialect: one has two, and keeps to the first."""
        if endpoint.path != "/api/chat/stream":
            return True
        return (endpoint.dialect == "tool") is (self.asked.dialect == "tool")

    async def read(self, answer: Answer, kind: Kind) -> bool:
        """Reads up to a cut (False) or to the end (True)."""
        assert answer.status in (200, 204), answer.status
        cut = self.chance.randrange(self.chance.choice(CUT_AFTER)) + 1
        rst = self.chance.random() < 0.5
        parser: Any = Sse() if kind.framing == "sse" else Ndjson()
        after = None if self.cuts >= self.most else cut
        items = await answer.read(parser, cut_after=after, rst=rst)
        self.trace.append(f"{kind} from {self.position or 0} cut {after}: {answer.ended}")
        self.take(kind, parser, items)
        self.cuts += answer.ended == "cut"
        return answer.ended == "end"

    def take(self, kind: Kind, parser: Any, items: list[Any]) -> None:
        """Takes what is whole, and remembers the last position."""
        for item in items:
            data = item.data if kind.framing == "sse" else ""
            if data == DONE:
                continue
            value = item.json() if kind.framing == "sse" else item
            id = item.id if kind.framing == "sse" else item["id"]
            if kind.dialect in ("chat", "native", "tool") and kind.framing == "sse":
                assert id == parser.last_event_id or item is not items[-1]
            self.taken.append((int(id.rpartition("-")[2]), text_of(kind, value)))
            self.position = id

    async def check(self) -> None:
        """The text is exact, no event came twice, and none after the last."""
        assert "".join(text for _, text in self.taken) == self.text
        offsets = [offset for offset, _ in self.taken]
        assert offsets == sorted(set(offsets))
        said = await status(self.url, self.stream_id)
        assert said["state"] == "finished"
        assert offsets[-1] <= int(said["position"].rpartition("-")[2])


class Joining(Story):
    """Of a client that joins an answer which others read too."""

    def __init__(self, url: str, model: str, prompt: str, text: str, seed: str) -> None:
        super().__init__(url, model, prompt, text, seed)
        self.kind, self.asked = self.chance.choice(EXACT), STREAM

    async def run(self) -> None:
        while not await self.come_back():
            pass
        await self.check()


class LooseStory(Story):
    """*content* over SSE, where the id comes after its data: a cut between the two repeats that one
    delta. A client that takes only what an id has confirmed has the exact text.
    """

    repeated = 0

    @property
    def kinds(self) -> list[Kind]:
        return [LOOSE]

    def take(self, kind: Kind, parser: Any, items: list[Any]) -> None:
        if not items:
            self.position = parser.last_event_id or self.position
            return
        # Each message is confirmed by the first id after it: that of the next one, or the last.
        ids = [*(item.id for item in items[1:]), parser.last_event_id]
        pending = [item for item, id in zip(items, ids, strict=True) if id == item.id]
        assert len(pending) <= 1, pending
        assert not pending or pending[0] is items[-1]
        self.repeated += len(pending)
        for item, id in zip(items, ids, strict=True):
            if item not in pending:
                text = "" if item.data == DONE else text_of(kind, item.json())
                self.taken.append((int(id.rpartition("-")[2]), text))
        self.position = parser.last_event_id or self.position


async def tell(stories: list[Story], at_once: int = AT_ONCE) -> None:
    """Runs many at once. A failure says which, and how it went."""
    doors = asyncio.Semaphore(at_once)

    async def run(story: Story) -> None:
        async with doors:
            try:
                await story.run()
            except BaseException as error:
                how = "\n  ".join([story.model, story.stream_id, *story.trace])
                raise AssertionError(f"SEED={SEED} {story.seed}:\n  {how}") from error

    results = await asyncio.gather(*map(run, stories), return_exceptions=True)
    for failure in filter(None, results):
        raise failure
    assert sum(story.cuts for story in stories) > len(stories) / 2


def relayed(
    relay_server: Server, kind: type[Story], batch: int, count: int = ANSWERS
) -> list[Story]:
    """Answers of the upstream: short and long, slow and fast, text and what looks like markup."""
    stories = []
    for n in range(count):
        seed = f"{kind.__name__} {batch}/{n}"
        chance = random.Random(f"{SEED} {seed}")
        rate, tokens = chance.choice([(60, 30), (300, 120), (2000, 400), (0, 300), (400, 3)])
        words = f"rate={rate},tokens={chance.randint(1, tokens)}"
        prompt = f"{seed}?"
        if chance.random() < 0.3:
            words, prompt = f"rate={rate},echo={chance.randint(1, 9)}", MARKED * 3
        else:
            words += chance.choice([",u2028", ",batch=7", ",split", ",reasoning=5", ""])
        model = named(words)
        text = expected(model, prompt)
        stories.append(kind(relay_server.url, model, prompt, text, f"{SEED} {seed}"))
    return stories


@pytest.mark.parametrize("batch", range(4))
async def test_an_upstreams_answers(
    relay_server: Server, upstream: UpstreamProcess, batch: int
) -> None:
    """Running and ended answers of an upstream, on all exact dialects and framings, sometimes on
    another one with the same position. However often a client comes back, its model is asked once.
    """
    stories = relayed(relay_server, Story, batch)
    await tell(stories)
    asked = [entry["model"] for entry in upstream.log()]
    assert {asked.count(story.model) for story in stories} == {1}


@pytest.mark.parametrize("batch", range(2))
async def test_the_demo_models_answers(demo_server: Server, batch: int) -> None:
    """The same of the embedded model, whose code, tables and images are labelled."""
    stories: list[Story] = []
    lengths = (1, 20, 90, 250)
    texts = {}
    prompt = "code, a table and an image"
    for tokens in lengths:
        body = {"prompt": prompt, "model": f"demo:rate=0,tokens={tokens}"}
        async with ask("POST", f"{demo_server.url}/api/v1/generate", json_body=body) as answer:
            texts[tokens] = (await answer.json())["text"]
    for n, tokens in zip(range(ANSWERS), itertools.cycle(lengths), strict=False):
        seed = f"{SEED} demo {batch}/{n}"
        rate = random.Random(seed).choice([100, 400, 1000])
        model = f"demo:rate={rate},tokens={tokens},jitter=0.5,reasoning=3"
        stories.append(Story(demo_server.url, model, prompt, texts[tokens], seed))
    await tell(stories)


async def test_many_readers_of_one_answer(relay_server: Server, upstream: UpstreamProcess) -> None:
    """Fifty readers of one running answer, each cut in its own places, all have the exact text."""
    model = named("tokens=300,rate=300,u2028")
    text = expected(model, PROMPT)
    async with asking(relay_server.url, STREAM, model=model) as answer:
        stories: list[Story] = []
        for n in range(50):
            stories.append(Joining(relay_server.url, model, PROMPT, text, f"{SEED} reader {n}"))
            stories[-1].stream_id = answer.headers["x-stream-id"]
        await tell(stories, at_once=50)
    assert len(upstream.log(model)) == 1


async def test_content_over_sse(relay_server: Server) -> None:
    """Of *content* over SSE a cut may repeat one delta, the one whose id had not come, and that is
    all: what ids have confirmed is exact.
    """
    stories = relayed(relay_server, LooseStory, 0, 2 * ANSWERS)
    await tell(stories)


async def test_content_over_sse_between_data_and_id(relay_server: Server) -> None:
    """Cut right after the data, before its id: exactly that delta comes again, and nothing else."""
    model = named("tokens=60,rate=200")
    async with asking(relay_server.url, STREAM, model=model) as answer:
        stream_id = answer.headers["x-stream-id"]
        body = await answer.body()
    blocks = [block + b"\n\n" for block in body.split(b"\n\n")[:-1]]
    texts = [Sse().feed(block) for block in blocks]
    for at, messages in enumerate(texts):
        if not messages or messages[0].data == DONE:
            continue
        assert blocks[at - 1].startswith(b"id: ")
        last = blocks[at - 1].decode().removeprefix("id: ").strip()
        async with resuming(relay_server.url, STREAM, last) as answer:
            again = [m for m in await answer.read(Sse()) if m.data != DONE]
        before = "".join(text_of(LOOSE, m.json()) for ms in texts[:at] for m in ms)
        whole = before + "".join(text_of(LOOSE, m.json()) for m in again)
        assert whole == expected(model, PROMPT)
        assert again[0].json()["content"].startswith(messages[0].json()["content"])
    assert (await status(relay_server.url, stream_id))["state"] == "finished"
