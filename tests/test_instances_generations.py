"""A generation is one, whichever instance makes it, reads it, resumes it or stops it."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from typing import Any

import pytest

from tests import test_cuts
from tests.bridged import Instances, messages, tells
from tests.clients import (
    DIALECTS,
    PROMPT,
    Kind,
    Seen,
    asked,
    attach,
    attached,
    named,
    once,
    see,
    start,
    status,
    stop,
)
from tests.conftest import SOAK
from tests.endpoints import url_of
from tests.people import following, joined, new_room, request
from tests.processes import UpstreamProcess
from tests.readers import ask
from tests.test_cuts import STREAM, Joining, Story, tell
from tests.upstream import expected

NATIVE, CHAT, OPENAI = Kind("native", "ndjson"), Kind("chat"), Kind("openai")
CUTS = 10_000 if SOAK else 300
STOPPED_WITHIN = 0.25  # seconds through Redis; here with a machine that others use too
GENEROUS = 2.5


async def begin(url: str, model: str, **headers: str) -> str:
    """Starts a generation and leaves it: its id."""
    async with asked(url, CHAT, model, headers=headers) as answer:
        return answer.headers["x-stream-id"]


# --- read elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_it_is_read_elsewhere(trio: Instances, dialect: str) -> None:
    """From its start, while it runs and after its end, in any dialect: the same as where it is
    made.
    """
    model = named("tokens=60,rate=100,reasoning=3")
    stream_id = await begin(trio.a, model)
    for _ in range(2):
        kinds = [Kind(dialect), Kind(dialect, "ndjson"), Kind(dialect, "text")]
        seen = await asyncio.gather(*(attach(trio.b, stream_id, kind) for kind in kinds))
        for each in seen:
            assert (each.text, each.ending, each.ended) == (
                expected(model, PROMPT),
                "finished",
                "end",
            )
    here, there = await status(trio.a, stream_id), await status(trio.c, stream_id)
    assert there == here
    assert there["state"] == "finished"
    first, second = [await attach(url, stream_id, NATIVE) for url in (trio.a, trio.b)]
    assert first.items == second.items


@pytest.mark.parametrize("framing", ["sse", "text"])
async def test_an_answer_that_does_not_linger(trio: Instances, framing: str) -> None:
    """Redis is asked before it begins; whoever asked is there in time to read it."""
    model = named("tokens=20,rate=100")
    seen = await start(trio.a, Kind("openai", framing), model)
    assert (seen.text, seen.ended) == (expected(model, PROMPT), "end")


async def test_a_failure_is_read_elsewhere(trio: Instances) -> None:
    """With the same code; and again after its end."""
    stream_id = await begin(trio.a, named("tokens=20,rate=100,end_clean=10"))
    for _ in range(2):
        seen = await attach(trio.b, stream_id, CHAT)
        assert (seen.ending, seen.code) == ("failed", "upstream_cut")


async def test_a_foreign_id_is_like_an_unknown_one(trio: Instances) -> None:
    """Also on an instance that does not make it."""
    stream_id = await begin(trio.a, named("tokens=500,rate=50"), **{"X-User-Id": "ann"})
    told = []
    for id in (stream_id, "f" * 32):
        told.append(await status(trio.b, id, **{"X-User-Id": "bob"}))
        told[-1]["error"].pop("request_id")
    assert told[0] == told[1]
    assert told[0]["status"] == 404
    assert (await status(trio.b, stream_id, **{"X-User-Id": "ann"}))["state"] == "running"
    await stop(trio.c, stream_id, **{"X-User-Id": "ann"})


async def test_a_reader_elsewhere_keeps_it_running(
    trio: Instances, upstream: UpstreamProcess
) -> None:
    """Nobody reads it where it is made, somebody reads it elsewhere: it runs on to its end. Once
    nobody does anywhere, it is cancelled.
    """
    (doomed,) = await trio.add(generation={"linger": 0.5})
    trio.servers.pop()
    try:
        model = named("tokens=120,rate=40")
        stream_id = await begin(doomed.url, model)
        seen = await attach(trio.b, stream_id, CHAT)
        assert (seen.ending, seen.text) == ("finished", expected(model, PROMPT))
        model = named("tokens=5000,rate=40")
        stream_id = await begin(doomed.url, model)
        async with attached(trio.b, stream_id, CHAT):
            await asyncio.sleep(1.5)
            assert (await status(trio.c, stream_id))["state"] == "running"
        await once(trio.c, stream_id, "state", "cancelled")
        (record,) = await upstream.requests(model, closed=True)
        assert record["closed_by"] == "client"
    finally:
        doomed.stop()


# --- resumed elsewhere --------------------------------------------------------------------------


class Wandering(Story):
    """Of a client that comes back to any of several instances; `url` names them all."""

    urls: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return self.chance.choice(self.urls)

    @url.setter
    def url(self, urls: str) -> None:
        self.urls = tuple(urls.split())

    async def check(self) -> None:
        for url in self.urls:
            await once(url, self.stream_id, "state", "finished")
        await super().check()


class WanderingTogether(Wandering, Joining):
    """Of one who reads with others."""


@pytest.mark.timeout(1200)
async def test_random_cuts(trio: Instances, upstream: UpstreamProcess) -> None:
    """Answers of an upstream, on all exact dialects and framings, whose readers are cut anywhere
    and come back to any instance with their position: nothing is lost, doubled or moved, and the
    model is asked once.
    """
    stories: list[Story] = []
    for n in range(CUTS * 2 // 3):
        seed = f"{test_cuts.SEED} wandering {n}"
        chance = random.Random(seed)
        rate, tokens = chance.choice([(60, 30), (300, 120), (2000, 400), (0, 300), (400, 3)])
        words = f"rate={rate},tokens={chance.randint(1, tokens)}"
        model = named(words + chance.choice([",u2028", ",batch=7", ",reasoning=5", ""]))
        prompt = f"{seed}?"
        text = expected(model, prompt)
        stories.append(Wandering(" ".join(trio.urls), model, prompt, text, seed))
    await tell(stories)
    print("cuts:", sum(story.cuts for story in stories))
    asked = [entry["model"] for entry in upstream.log()]
    assert {asked.count(story.model) for story in stories} == {1}


async def test_many_readers_of_one_answer(trio: Instances) -> None:
    """Thirty readers of one running answer, cut and coming back everywhere, have the exact text."""
    model = named("tokens=300,rate=200,u2028")
    stream_id = await begin(trio.a, model)
    urls, text = " ".join(trio.urls), expected(model, PROMPT)
    stories: list[Story] = []
    for n in range(30):
        stories.append(WanderingTogether(urls, model, PROMPT, text, f"{test_cuts.SEED} reader {n}"))
        stories[-1].asked, stories[-1].stream_id = STREAM, stream_id
    await tell(stories, at_once=30)


@pytest.mark.timeout(1200)
async def test_random_cuts_in_a_room(trio: Instances) -> None:
    """The same of answers in a room: their readers come back to any instance over any transport.
    What `joined` and the chunks after it say, or `stream_end` of one that ended meanwhile, is the
    exact text of each.
    """
    room, count = new_room(), CUTS // 60
    models = [named(f"tokens={20 + 7 * n % 60},rate=60") for n in range(count)]
    told: list[dict[str, str]] = [{} for _ in range(10)]
    cuts = 0

    async def read(number: int) -> None:
        nonlocal cuts
        chance, position, ended = random.Random(f"{test_cuts.SEED} {number}"), None, told[number]
        while len(ended) < count:
            transport, url = chance.choice(("ws", "sse", "ndjson")), chance.choice(trio.urls)
            running: dict[str, tuple[int, str]] = {}
            after = position
            async with following(url, room, transport, after=after) as follower:
                for _ in range(chance.choice((1, 5, 20, 60))):
                    frame = await follower.next()
                    position = frame.get("id", position)
                    take(frame, running, ended)
                    if len(ended) == count:
                        return
                cuts += 1
                follower.cut(chance.random() < 0.5)

    def take(frame: Any, running: dict[str, tuple[int, str]], ended: dict[str, str]) -> None:
        assert frame["type"] != "gap"
        if frame["type"] == "joined":
            for each in frame["active"]:
                running[each["stream_id"]] = each["seq"], each["content"]
        elif frame["type"] == "stream_start":
            running.setdefault(frame["stream_id"], (0, ""))
        elif frame["type"] == "stream_chunk":
            seq, text = running[frame["stream_id"]]
            assert frame["seq"] > seq
            running[frame["stream_id"]] = frame["seq"], text + frame["content"]
        elif frame["type"] == "stream_end":
            assert frame["stream_id"] not in ended
            _, text = running.pop(frame["stream_id"], (0, frame["content"]))
            assert text in (frame["content"], "") or frame["content"].startswith(text)
            ended[frame["stream_id"]] = frame["content"]

    reading = [asyncio.create_task(read(number)) for number in range(len(told))]
    async with joined(trio.a, room, "ann") as ann:
        while len((await ann.call("presence"))["members"]) < 2:
            pass
        ids: list[str] = []
        for model, url in zip(models, itertools.cycle(trio.urls), strict=False):
            async with joined(url, room, "ann") as writer:
                ids.append((await writer.call("generate", message="go", model=model))["stream_id"])
                await writer.hear("stream_end", stream_id=ids[-1])
    await asyncio.gather(*reading)
    print("cuts:", cuts)
    assert {tuple(sorted(each)) for each in told} == {tuple(sorted(ids))}
    assert len({tuple(sorted(each.items())) for each in told}) == 1


# --- stopped elsewhere --------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the first token", "midway"])
async def test_it_is_stopped_elsewhere(
    trio: Instances, upstream: UpstreamProcess, when: str
) -> None:
    """Made on one instance, read through another, stopped through a third: the upstream's
    connection is closed within 250 ms, and everybody reading sees `cancelled`.
    """
    took: list[float] = []
    for _ in range(5):
        words = "delay=60" if when == "before the first token" else "tokens=5000,rate=50"
        model = named(words)
        async with asked(trio.a, CHAT, model) as answer:
            stream_id = answer.headers["x-stream-id"]
            reading = [asyncio.create_task(see(CHAT, answer))]
            reading += [asyncio.create_task(attach(trio.b, stream_id, k)) for k in (NATIVE, OPENAI)]
            await upstream.requests(model)
            if when == "midway":
                while "text" not in (await _peek(trio.b, stream_id)):
                    pass
            begun = time.monotonic()
            assert (await stop(trio.c, stream_id)).status == 200
            (record,) = await upstream.requests(model, closed=True)
            took.append(record["closed_at"] - begun)
            seen = await asyncio.gather(*reading)
        assert record["closed_by"] == "client"
        assert [each.ending for each in seen] == ["cancelled", "cancelled", "cancelled"]
        assert (await status(trio.c, stream_id))["state"] == "cancelled"
        assert (await stop(trio.b, stream_id)).status == 200
    print(f"stop {when}: median {statistics.median(took):.3f} s, most {max(took):.3f} s")
    assert statistics.median(took) < STOPPED_WITHIN
    assert max(took) < GENEROUS


async def _peek(url: str, stream_id: str) -> str:
    """What it has said so far, as this instance knows."""
    path = f"/api/v1/streams/{stream_id}/events"
    async with ask("GET", url_of(url, path, format="ndjson")) as answer:
        async for piece in answer.pieces():
            return piece.decode()
    return ""


# --- keys ---------------------------------------------------------------------------------------


async def test_one_key_on_many_instances(trio: Instances, upstream: UpstreamProcess) -> None:
    """The same key and body, at once and later, on any instance: one answer, one call of the model,
    the same stream for all from its start. Another body is 422; another person's key another one.
    """
    model, key = named("tokens=60,rate=100"), {"Idempotency-Key": new_room(), "X-User-Id": "ada"}
    together = [start(url, CHAT, model, headers=key) for url in trio.urls * 2]
    seen: list[Seen] = await asyncio.gather(*together)
    seen += [await start(url, CHAT, model, headers=key) for url in trio.urls]
    assert len({each.stream_id for each in seen}) == 1
    for each in seen:
        assert (each.ending, each.text) == ("finished", expected(model, PROMPT))
    assert len(upstream.log(model)) == 1
    for url in trio.urls:
        refused = await start(url, CHAT, model, headers=key, max_tokens=5)
        assert (refused.status, refused.code) == (422, "invalid_field")
    other = await start(trio.b, CHAT, model, headers={**key, "X-User-Id": "bob"})
    assert other.stream_id != seen[0].stream_id


async def test_a_key_whose_answer_failed_is_free(trio: Instances) -> None:
    """On every instance, also where nobody has looked at that answer."""
    model = named("status=400,then,tokens=5")
    key = {"Idempotency-Key": new_room(), "X-User-Id": "ada"}
    assert (await start(trio.a, CHAT, model, headers=key)).ending == "failed"
    async with asyncio.timeout(30):  # others hear of the end a moment later
        while (seen := await start(trio.b, CHAT, model, headers=key)).ending == "failed":
            pass
    assert (seen.ending, seen.text) == ("finished", expected(named("tokens=5"), PROMPT))
    assert (await start(trio.c, CHAT, model, headers=key)).stream_id == seen.stream_id


async def test_a_key_in_a_conversation(trio: Instances) -> None:
    """What was asked is in the conversation once."""
    conversation, model, key = new_room(), named("tokens=5"), {"Idempotency-Key": new_room()}
    fields = {"conversation_id": conversation}
    together = [start(url, CHAT, model, headers=key, **fields) for url in trio.urls * 2]
    seen = await asyncio.gather(*together)
    assert len({each.stream_id for each in seen}) == 1
    room = f"conv:anonymous:{conversation}"
    async with asyncio.timeout(30):
        while len(told := await messages(trio.b, room)) < 2:
            pass
    assert told == [PROMPT, expected(model, PROMPT)]


async def test_nothing_of_this_broke(trio: Instances) -> None:
    """No instance has logged an error of its own, and all are ready."""
    assert trio.broke() == []
    await tells(True, *trio.urls)
    assert (await request(trio.a, "GET", "/health"))[0] == 200
