"""A model's answers in a room, and a conversation with one, whichever instance each has come to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.bridged import Instances, here, messages, tells
from tests.clients import named, stop
from tests.people import TRANSPORTS, following, joined, new_room
from tests.processes import UpstreamProcess
from tests.readers import ask


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_answer_is_followed_elsewhere(trio: Instances, transport: str) -> None:
    """Its start, what it says and its end are in the room on each instance, in this order; who
    comes midway has the text so far and then the rest.
    """
    room, model = new_room(), named("tokens=60,rate=60")

    async def follow(url: str, after: int) -> tuple[str, str]:
        async with following(url, room, transport) as follower:
            frames = [await follower.next()]
            if after:
                frames += await follower.until("stream_chunk")
            come.release()
            text = "".join(each["content"] for each in frames[0]["active"])
            frames += await follower.until("stream_end")
            chunks = [frame for frame in frames if frame["type"] == "stream_chunk"]
            assert [c["seq"] for c in chunks] == sorted({c["seq"] for c in chunks})
            if text:
                assert chunks[0]["seq"] > frames[0]["active"][0]["seq"]
            return text + "".join(c["content"] for c in chunks), frames[-1]["content"]

    come = asyncio.Semaphore(0)
    async with joined(trio.a, room, "ann") as ann:
        bob = asyncio.create_task(follow(trio.b, after=1))
        await here(trio.a, room, "ann", "anonymous")
        await ann.call("generate", message="go", model=model)
        await come.acquire()  # it is under way on b
        others = [asyncio.create_task(follow(url, after=0)) for url in (trio.c, trio.b, trio.a)]
        told = await asyncio.gather(bob, *others)
    whole = told[0][1]
    assert len(whole.split()) == 60
    assert told == [(whole, whole)] * 4


async def test_an_answer_is_stopped_from_elsewhere(trio: Instances) -> None:
    """By a frame or by REST, on an instance that does not run it: all see `stream_cancelled`, with
    the text so far, once.
    """
    room = new_room()
    async with joined(trio.a, room, "ann") as ann, joined(trio.b, room, "bob") as bob:
        for by in ("frame", "rest"):
            told = await ann.call("generate", message="go", model=named("tokens=500,rate=50"))
            await bob.hear("stream_chunk")
            if by == "frame":
                await bob.call("stop", stream_id=told["stream_id"])
            else:
                assert (await stop(trio.c, told["stream_id"])).status == 200
            ends = await asyncio.gather(*(p.hear("stream_cancelled") for p in (ann, bob)))
            assert ends[0] == ends[1]
            assert ends[0]["content"]
        for follower in (ann, bob):
            frames = [frame["type"] for frame in await follower.so_far()]
            assert "stream_cancelled" not in frames


async def test_a_conversation_goes_on_elsewhere(trio: Instances, upstream: UpstreamProcess) -> None:
    """The model is told what was said before, whichever instance it was said on; on the same one
    as soon as the client has seen the end of it.
    """
    conversation, said = new_room(), []
    room = f"conv:anonymous:{conversation}"
    for number, url in enumerate([trio.a, *trio.urls]):
        async with asyncio.timeout(30):
            # On the same instance, at once; elsewhere, once that is told.
            while number > 1 and len(await messages(url, room)) < 2 * number:
                pass
        model = named("tokens=3")
        body = {"message": f"question {number}", "model": model, "conversation_id": conversation}
        status, _ = await _chat(url, body)
        assert status == 200
        (record,) = await upstream.requests(model, closed=True)
        said = record["body"]["messages"]
    asked = [message["content"] for message in said if message["role"] == "user"]
    assert asked == [f"question {number}" for number in range(4)]
    assert [m["role"] for m in said] == ["user", "assistant"] * 3 + ["user"]


async def _chat(url: str, body: Any) -> tuple[int, bytes]:
    async with ask("POST", f"{url}/api/chat/stream", json_body=body) as answer:
        return answer.status, await answer.body()


async def test_nothing_of_this_broke(trio: Instances) -> None:
    """No instance has logged an error of its own, and all are ready."""
    assert trio.broke() == []
    await tells(True, *trio.urls)
