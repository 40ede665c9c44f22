"""Who is in a room: each person once, however many tabs, and nobody who is not there."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

import pytest

from streaming import config
from streaming.delivery import Delivery
from streaming.presence import Presence
from streaming.room import Keeper, Room
from streaming.rooms import Rooms
from tests.conftest import SOAK, StartServer
from tests.people import (
    TRANSPORTS,
    Socket,
    empty,
    following,
    joined,
    members,
    new_room,
    on_socket,
    request,
)
from tests.processes import Server, until
from tests.readers import Refused

GRACE = 0.5


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server where a reload has half a second."""
    process = Server(tmp_path_factory.mktemp("quick"), {"rooms": {"grace": GRACE}})
    yield process
    process.stop()


def comings(frames: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(told["type"], told["userId"]) for told in frames if told["type"].startswith("user_")]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_coming_and_going_is_told(quick: Server, transport: str) -> None:
    """`user_joined` at once and `user_left` after the grace, of whoever is on any transport; not to
    oneself on coming.
    """
    room = new_room()
    async with joined(quick.url, room, "ann") as ann:
        async with joined(quick.url, room, "bob", transport) as bob:
            told = await ann.next()
            assert told == {"type": "user_joined", "room": room, "userId": "bob"}
            assert await members(quick.url, room) == ["ann", "bob"]
            bob.cut()
        loop = asyncio.get_running_loop()
        began = loop.time()
        told = await ann.next()
        assert told == {"type": "user_left", "room": room, "userId": "bob"}
        assert loop.time() - began > 0.8 * GRACE
        assert await members(quick.url, room) == ["ann"]


async def test_a_person_comes_and_goes_once(quick: Server) -> None:
    """Not per tab: the first brings them, the last takes them away."""
    room = new_room()
    async with joined(quick.url, room, "ann") as ann:
        async with contextlib.AsyncExitStack() as stack:
            for transport in (*TRANSPORTS, *TRANSPORTS):
                await stack.enter_async_context(joined(quick.url, room, "bob", transport))
            assert await members(quick.url, room) == ["ann", "bob"]
        heard = await ann.until("user_left")
    assert comings(heard) == [("user_joined", "bob"), ("user_left", "bob")]


async def test_a_tab_less_is_nobody_less(quick: Server) -> None:
    """As long as another is open."""
    room = new_room()
    async with joined(quick.url, room, "ann") as ann, joined(quick.url, room, "bob"):
        async with joined(quick.url, room, "bob", "sse"):
            await ann.hear("user_joined")
        await asyncio.sleep(3 * GRACE)
        assert await ann.so_far() == []
        assert await members(quick.url, room) == ["ann", "bob"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_reload_does_not_flicker(quick: Server, transport: str) -> None:
    """Who is back within the grace has never been away."""
    room = new_room()
    async with joined(quick.url, room, "ann") as ann:
        async with joined(quick.url, room, "bob", transport):
            await ann.hear("user_joined")
        for _ in range(5):
            async with joined(quick.url, room, "bob", transport):
                await asyncio.sleep(GRACE / 4)
        async with joined(quick.url, room, "bob", transport):
            await asyncio.sleep(3 * GRACE)
            assert await ann.so_far() == []


async def test_leaving_a_room_is_going(quick: Server) -> None:
    """By a frame, with the socket still open; and joining it again is coming back."""
    room = new_room()
    async with joined(quick.url, room, "ann") as ann, on_socket(quick.url, user_id="bob") as bob:
        for _ in range(2):
            await bob.call("join", room=room)
            assert (await ann.hear("user_joined"))["userId"] == "bob"
            await bob.call("leave", room=room)
            assert (await ann.hear("user_left"))["userId"] == "bob"


async def test_a_newcomer_sees_who_is_here(quick: Server) -> None:
    """In `joined`: each person once, in order, oneself among them."""
    room = new_room()
    async with (
        joined(quick.url, room, "cy"),
        joined(quick.url, room, "ann"),
        joined(quick.url, room, "ann"),
        following(quick.url, room, "sse", "bob") as bob,
    ):
        assert (await bob.next())["members"] == ["ann", "bob", "cy"]


async def test_rooms_are_apart(quick: Server) -> None:
    """Coming into one room is told in no other."""
    room, other = new_room(), new_room()
    async with joined(quick.url, room, "ann") as ann, joined(quick.url, other, "bob"):
        assert await ann.so_far() == []
        assert await members(quick.url, room) == ["ann"]


async def test_nobody_comes_by_asking(quick: Server) -> None:
    """To publish, to look back and to ask who is here is not to be there."""
    room = new_room()
    for method, path, body in (
        ("POST", "messages", {"content": "Hi"}),
        ("GET", "messages", None),
        ("GET", "presence", None),
    ):
        await request(quick.url, method, f"/api/v1/rooms/{room}/{path}", body, "ann")
    assert await members(quick.url, room) == []


async def test_presence_is_exact_after_crashes(quick: Server) -> None:
    """Clients that go away in every way, some at once after coming: whoever watched has heard each
    person come and go once, in turn, and who is left is who is there.
    """
    room, chance = new_room(), random.Random(7)
    stayers = [f"stay{number}" for number in range(5)]

    async def come_and_go(number: int) -> None:
        user = f"user{number % 40}"
        transport = chance.choice(TRANSPORTS)
        how = chance.choice(("fin", "rst", "leave", "early"))
        async with following(quick.url, room, transport, user) as person:
            if how != "early":
                await person.hear("joined")
                await asyncio.sleep(chance.uniform(0, 0.2))
            if how == "leave" and isinstance(person, Socket):
                await person.call("leave", room=room)
            person.cut(how == "rst")

    async with contextlib.AsyncExitStack() as stack:
        ann = await stack.enter_async_context(joined(quick.url, room, "ann"))
        for user in stayers:
            transport = chance.choice(TRANSPORTS)
            await stack.enter_async_context(joined(quick.url, room, user, transport))
        for _ in range(20 if SOAK else 3):
            await asyncio.gather(*(come_and_go(number) for number in range(120)))
        async with asyncio.timeout(30):
            while await members(quick.url, room) != ["ann", *stayers]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        here = {"ann"}
        for type, user in comings(await ann.so_far()):
            assert (user in here) is (type == "user_left"), user
            here ^= {user}
        assert here == {"ann", *stayers}
    await empty(quick.url, room)


async def test_who_is_refused_was_never_there(server: StartServer) -> None:
    """A stream that is one too many is told so, and nobody in the room hears of it."""
    url = server(limits={"connections_per_user": 1}, rooms={"grace": 0}).url
    async with joined(url, "a", "ann") as ann, joined(url, "b", "bob"):
        with pytest.raises(Refused):
            async with following(url, "a", "sse", "bob"):
                pass
        async with joined(url, "a", "cid"):
            assert comings([await ann.next()]) == [("user_joined", "cid")]


async def test_who_left_a_deleted_room_may_be_in_a_new_one_of_its_name() -> None:
    """Its end is not told to other instances as a going: they know rooms by their names."""
    told: list[str] = []

    class Others(Keeper):
        def entered(self, room: Room, user: str) -> None:
            told.append("in")

        def left(self, room: Room, user: str) -> None:
            told.append("out")

    rooms = Rooms(config.Rooms(), config.History(), Others())
    presence = Presence(Delivery(config.Delivery()), grace=0)
    before = rooms.get("a")
    presence.enter(before, "ann")
    rooms.end("a", "moderator")
    again = rooms.get("a")
    presence.enter(again, "ann")
    presence.leave(before, "ann")
    await until(lambda: not before.people)
    assert (told, again.members) == (["in", "in"], ["ann"])
    presence.leave(again, "ann")
    await until(lambda: not again.people)
    assert told == ["in", "in", "out"]
