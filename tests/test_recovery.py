"""Coming back to a room: exact where it can be, announced where it cannot, on any transport.

`SEED=...`, which a failure names, repeats the random cuts as far as the network lets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.clients import MEDIA
from tests.conftest import SOAK, StartServer
from tests.people import JSON, TRANSPORTS, Stream, following, joined, new_room, on_socket, publish
from tests.processes import Server, until
from tests.raw_socket import dialled
from tests.readers import Ndjson, Sse, ask

SEED = os.environ.get("SEED") or secrets.token_hex(4)
CUTS = 10_000 if SOAK else 300  # in each of the two runs of random cuts
READERS = 10
WRITERS = 3
PAIRS = list(itertools.product(TRANSPORTS, TRANSPORTS))


def offset_of(id: str) -> int:
    return int(id.rpartition("-")[2])


async def fill(url: str, room: str, count: int) -> list[str]:
    """Publishes so many messages; their ids."""
    batch = [{"content": str(number)} for number in range(count)]
    _, told = await publish(url, room, batch)
    ids: list[str] = told["ids"]
    return ids


# --- recovered ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), PAIRS)
async def test_a_reader_moves_between_transports(
    demo_server: Server, before: str, after: str
) -> None:
    """With its position: `recovered`, the messages up to there, then what it missed, once, and what
    comes.
    """
    room = new_room()
    async with joined(demo_server.url, room, transport=before) as ann:
        await fill(demo_server.url, room, 3)
        await ann.hear("message", content="1")
    await publish(demo_server.url, room, {"content": "missed"})
    async with following(demo_server.url, room, after, after=ann.last_id) as ann:
        told = await ann.next()
        assert (told["type"], told["recovered"]) == ("joined", True)
        assert [message["content"] for message in told["messages"]] == ["0", "1"]
        await publish(demo_server.url, room, {"content": "new"})
        heard = await ann.until("message", content="new")
    assert [frame["content"] for frame in heard] == ["2", "missed", "new"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_without_a_position_it_goes_on_from_now(demo_server: Server, transport: str) -> None:
    """Not recovered, no gap: a newcomer has missed nothing."""
    room = new_room()
    ids = await fill(demo_server.url, room, 3)
    async with following(demo_server.url, room, transport) as ann:
        told = await ann.next()
        assert (told["type"], told["recovered"], told["id"]) == ("joined", False, ids[-1])
        await publish(demo_server.url, room, {"content": "new"})
        assert (await ann.next())["content"] == "new"


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_id_of_joined_is_a_position_too(demo_server: Server, transport: str) -> None:
    """Who was cut before anything else came misses nothing."""
    room = new_room()
    async with joined(demo_server.url, room, transport=transport) as ann:
        pass
    await publish(demo_server.url, room, {"content": "missed"})
    async with following(demo_server.url, room, transport, after=ann.last_id) as ann:
        assert (await ann.next())["recovered"]
        assert (await ann.next())["content"] == "missed"


async def test_join_on_a_socket_takes_a_position(demo_server: Server) -> None:
    """For each room its own; what comes later comes once, whatever else the socket follows."""
    rooms = [new_room() for _ in range(3)]
    ids = [await fill(demo_server.url, room, 5) for room in rooms]
    async with on_socket(demo_server.url) as ann:
        for number, room in enumerate(rooms):
            told = await ann.call("join", room=room, last_event_id=ids[number][number])
            assert told["recovered"]
            missed = 4 - number
            heard = [await ann.hear("message", room=room) for _ in range(missed)]
            assert [frame["id"] for frame in heard] == ids[number][number + 1 :]
        for room in rooms:
            await publish(demo_server.url, room, {"content": f"new in {room}"})
        heard = [frame for frame in await ann.so_far() if frame["type"] == "message"]
        assert [frame["content"] for frame in heard] == [f"new in {room}" for room in rooms]


async def test_an_empty_position_is_none(demo_server: Server) -> None:
    """As a client sends that has not had one yet, in a frame or in its query."""
    async with on_socket(demo_server.url, "/ws/empty", last_event_id="") as ann:
        assert (await ann.next())["type"] == "joined"
        told = await ann.call("join", room=new_room(), last_event_id="")
        assert (told["type"], told["recovered"]) == ("joined", False)


# --- gaps ---------------------------------------------------------------------------------------

BAD: dict[str, Callable[[list[str]], str]] = {
    "malformed": lambda ids: "nonsense",
    "without an epoch": lambda ids: "-7",
    "negative": lambda ids: ids[0].rpartition("-")[0] + "--1",
    "of another room or life": lambda ids: "epoch_of_another_life-3",
    "not yet written": lambda ids: ids[0].rpartition("-")[0] + "-999",
    "no number JavaScript could count": lambda ids: ids[0].rpartition("-")[0] + "-" + "9" * 30,
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", BAD)
async def test_a_position_that_cannot_be_honoured(
    demo_server: Server, transport: str, what: str
) -> None:
    """`gap` with what was asked for and where it goes on instead; then `joined`, not recovered,
    with all that is needed; then what comes.
    """
    room = new_room()
    ids = await fill(demo_server.url, room, 3)
    asked = BAD[what](ids)
    async with following(demo_server.url, room, transport, after=asked) as ann:
        assert await ann.next() == {
            "type": "gap",
            "room": room,
            "requested": asked,
            "resumed": ids[-1],
        }
        told = await ann.next()
        assert (told["type"], told["recovered"], told["id"]) == ("joined", False, ids[-1])
        assert [message["id"] for message in told["messages"]] == ids
        await publish(demo_server.url, room, {"content": "new"})
        assert (await ann.next())["content"] == "new"


async def test_a_position_that_is_no_text(demo_server: Server) -> None:
    """Bytes of a header that are not UTF-8 are a position as wrong as any other."""
    bad, path = {"Last-Event-ID": "a\udcff-1"}, f"{demo_server.url}/api/v1/rooms/x/events"
    for transport in ("sse", "ndjson"):
        async with ask("GET", path, headers={"Accept": MEDIA[transport], **bad}) as answer:
            told = await Stream(answer, Sse() if transport == "sse" else Ndjson()).next()
            assert (told["type"], told["requested"]) == ("gap", "a?-1")
    async with dialled(demo_server.url, "/ws/x", headers=bad) as socket:
        assert (await socket.hear("gap"))["requested"] == "a?-1"
        await socket.hear("joined")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_position_that_was_trimmed_away(server: StartServer, transport: str) -> None:
    """Is told so; the oldest that is still good recovers."""
    url = server(rooms={"events": 5}).url
    ids = await fill(url, "a", 20)
    async with following(url, "a", transport, after=ids[13]) as ann:
        told = await ann.next()
        assert (told["type"], told["requested"]) == ("gap", ids[13])
        assert not (await ann.next())["recovered"]
    async with following(url, "a", transport, after=ids[14]) as ann:
        assert (await ann.next())["recovered"]
        assert [(await ann.next())["id"] for _ in range(5)] == ids[15:]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_restart_is_told(server: StartServer, transport: str) -> None:
    """A room begins again with another epoch: an old position is never taken for one of its own."""
    first = server()
    ids = await fill(first.url, "a", 3)
    first.stop()
    second = server()
    await fill(second.url, "a", 5)
    async with following(second.url, "a", transport, after=ids[1]) as ann:
        assert (await ann.next())["type"] == "gap"
        told = await ann.next()
        assert (told["recovered"], len(told["messages"])) == (False, 5)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_more_than_is_kept_in_one_moment(server: StartServer, transport: str) -> None:
    """Who is live when more comes at once than the room keeps is cut, is told on coming back, and
    the room goes on for all.
    """
    process = server(rooms={"events": 5})
    async with following(process.url, "a", transport) as ann:
        await ann.next()
        await fill(process.url, "a", 20)
        assert await ann.rest() == []
        if transport == "ws":
            assert ann.code == 4408  # type: ignore[attr-defined]
    async with following(process.url, "a", transport, after=ann.last_id) as ann:
        assert (await ann.next())["type"] == "gap"
        assert not (await ann.next())["recovered"]
        await publish(process.url, "a", {"content": "new"})
        assert (await ann.hear("message"))["content"] == "new"
    assert not [line for line in process.log_lines() if line.get("level") == "error"]


# --- random cuts --------------------------------------------------------------------------------


class Reader:
    """Follows a room through cuts. heard: the events it took, in order; None stands for a hole that
    was announced. urls: of the servers that it may come to. pause: how long it may stay away.
    """

    def __init__(self, urls: Sequence[str], room: str, seed: str, pause: float) -> None:
        self.urls, self.room, self.pause = urls, room, pause
        self.seed, self.chance = seed, random.Random(seed)
        self.heard: list[JSON | None] = []
        self.position: str | None = None
        self.gaps = self.recovered = 0

    async def run(self, cuts: int, last: asyncio.Event) -> None:
        """Is cut so often, and then reads up to the message `last`."""
        for _ in range(cuts):
            await self._visit(self.chance.choice(TRANSPORTS), cut=True)
            await asyncio.sleep(self.chance.choice((0, 0, self.pause)))
        last.set()
        while not await self._visit(self.chance.choice(TRANSPORTS), cut=False):
            pass  # it fell behind, and was cut

    async def _visit(self, transport: str, cut: bool) -> bool:
        chance, room = self.chance, self.room
        options: dict[str, Any] = {"after": self.position}
        self.told_of_gap = False  # in this visit
        frames = chance.choice((0, 1, 3, 10, 30)) if cut else 1 << 30
        if cut and transport != "ws":  # anywhere, in the middle of a line too
            options["cut_after"] = chance.randint(1, chance.choice((1500, 15_000)))
            options["rst"] = chance.random() < 0.5
        async with following(chance.choice(self.urls), room, transport, **options) as follower:
            with contextlib.suppress(EOFError):
                for _ in range(frames):
                    if self._take(await follower.next()):
                        return True
            follower.cut(chance.random() < 0.5)
        return False

    def _take(self, told: JSON) -> bool:
        if told["type"] == "gap":
            assert told["requested"] == self.position, self.seed
            self.gaps += 1
            self.heard.append(None)
            self.told_of_gap = True
        elif told["type"] == "joined":
            whole = self.position is not None and not self.told_of_gap
            assert told["recovered"] is whole, self.seed
            assert not told["recovered"] or told["id"] == self.position, self.seed
            self.recovered += told["recovered"]
        elif told["type"] == "message":
            self.heard.append(told)
        self.position = told.get("id", self.position)
        return told.get("content") == "last"


async def write(url: str, room: str, name: str, pause: float, done: asyncio.Event) -> None:
    """Publishes numbered messages, one by one and in batches, by REST and by frames."""
    numbers, chance = itertools.count(), random.Random(name)
    async with joined(url, room, name) as socket:
        while not done.is_set():
            size = chance.choice((0, 1, 5))
            if size:
                await publish(url, room, [content(name, next(numbers)) for _ in range(size)], name)
            else:
                await socket.call("message", **content(name, next(numbers)))
            await asyncio.sleep(pause)


def content(name: str, number: int) -> JSON:
    return {"content": f"{name} {number} " + "x" * (number % 90)}


async def random_cuts(
    urls: Sequence[str], pause: float, writing: float, to: Sequence[str] = ()
) -> tuple[list[Reader], list[JSON]]:
    """The readers after their cuts, and all that was published, as one saw it that was not cut. to:
    the URLs that it is published to in turn, if they are others.
    """
    room = new_room()
    readers = [Reader(urls, room, f"{SEED}.{number}", pause) for number in range(READERS)]
    through, done = [asyncio.Event() for _ in readers], asyncio.Event()
    witness = Reader(urls, room, SEED, 0)
    async with asyncio.TaskGroup() as group:
        group.create_task(witness.run(0, asyncio.Event()))
        await until(lambda: witness.position)
        for reader, event in zip(readers, through, strict=True):
            group.create_task(reader.run(CUTS // READERS, event))
        writers = [
            group.create_task(write(url, room, f"writer{number}", writing, done))
            for number, url in zip(range(WRITERS), itertools.cycle(to or urls), strict=False)
        ]
        for event in through:
            await event.wait()
        done.set()
        await asyncio.wait(writers)
        await publish(urls[0], room, {"content": "last"})
    assert witness.gaps == 0 and len(witness.heard) > CUTS / 2
    told = [frame for frame in witness.heard if frame is not None]
    assert [offset_of(frame["id"]) for frame in told] == list(range(1, len(told) + 1))
    for number in range(WRITERS):
        name = f"writer{number}"
        own = [frame["content"] for frame in told if frame["userId"] == name]
        assert own == [content(name, n)["content"] for n in range(len(own))]
    return readers, told


def exact(readers: Sequence[Reader], told: Sequence[JSON]) -> None:
    """Each has all that was told since its first position, once and in order, and no gap."""
    for reader in readers:
        assert (reader.gaps, None in reader.heard) == (0, False), reader.seed
        missing = len(told) - len(reader.heard)  # published before it had its first position
        assert reader.heard == told[missing:], reader.seed
        assert reader.recovered > 0, reader.seed


@pytest.mark.timeout(1200)
async def test_random_cuts_inside_retention(server: StartServer) -> None:
    """Ten readers cut again and again, anywhere, coming back on any transport, while several
    write: each has every event once, in order, the same as one that was never cut.
    """
    process = server(rooms={"events": 10**6, "bytes": 2**30}, history={"messages": 5})
    exact(*await random_cuts([process.url], pause=0.2, writing=0.002))


@pytest.mark.timeout(1200)
async def test_random_cuts_outside_retention(server: StartServer) -> None:
    """The same in a room that keeps little, with readers who stay away too long: whatever is
    missing is announced, and nothing is doubled or moved.
    """
    url = server(rooms={"events": 30}, history={"messages": 5}).url
    readers, told = await random_cuts([url], pause=0.4, writing=0.005)
    assert sum(reader.gaps for reader in readers) > len(readers)
    assert sum(reader.recovered for reader in readers) > len(readers)
    by_offset = {offset_of(frame["id"]): frame for frame in told}
    for reader in readers:
        before, announced = None, False
        for frame in reader.heard:
            if frame is None:
                announced = True
                continue
            offset = offset_of(frame["id"])
            assert frame == by_offset[offset], reader.seed
            if before is not None:
                assert offset > before if announced else offset == before + 1, reader.seed
            before, announced = offset, False
        assert before == len(told), reader.seed
