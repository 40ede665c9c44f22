"""Tickets: what each is good for, for how long, once or again; in memory and in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming import config, tickets
from streaming.auth import Auth, Identity
from streaming.config import Key
from streaming.errors import InvalidField, Unauthorized, Unavailable
from streaming.grants import Grants
from streaming.redis_doors import RedisStore
from streaming.redis_link import Link
from streaming.tickets import Memory, Tickets, target
from tests.processes import until
from tests.properties import property_test
from tests.redis_server import RedisServer

AUTH = Auth(config.Auth(mode="token", keys=(Key("k", "ann", grants=Grants.read(["a*"])),)))
ANN = AUTH.identify("k")
BOB = Identity("bob", expires=time.time() + 86_400)
EVENTS = "/api/v1/rooms/lobby/events"


@asynccontextmanager
async def linked(redis: RedisServer) -> AsyncIterator[Link]:
    link = Link(redis.url, "r:", lambda: None, lambda message: None)
    await link.start()
    try:
        yield link
    finally:
        await link.close()


@pytest.fixture(params=["memory", "redis"])
async def two(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Tickets, Tickets]]:
    """Tickets of two instances; in memory they are one."""
    if request.param == "memory":
        one = Tickets(AUTH, Memory())
        yield one, one
        return
    redis = request.getfixturevalue("redis_server")()
    async with linked(redis) as here, linked(redis) as there:
        yield Tickets(AUTH, RedisStore(here)), Tickets(AUTH, RedisStore(there))
        assert all("{" in name for name in redis.names())


Two = tuple[Tickets, Tickets]


async def refused(each: Tickets, ticket: str, where: str, socket: bool = False) -> bool:
    """Whether this ticket is, as any other that is not good."""
    try:
        await each.redeem(ticket, where, socket)
    except Unauthorized as error:
        assert (error.code, error.message) == ("ticket_invalid", "the ticket is not valid")
        return True
    return False


async def test_a_websocket_spends_its_ticket(two: Two) -> None:
    """One instance takes what another has given; of many who come with it one gets in."""
    here, there = two
    ticket = await here.issue(ANN)
    assert len(ticket) >= 43
    many = [each.redeem(ticket, "/ws/lobby", True) for each in (here, there) * 10]
    results = await asyncio.gather(*many, return_exceptions=True)
    assert [result for result in results if isinstance(result, Identity)] == [ANN]
    assert sum(isinstance(result, Unauthorized) for result in results) == 19
    for socket in (True, False):
        assert await refused(there, ticket, "/ws/lobby", socket)


async def test_an_event_stream_comes_back_with_its_ticket(two: Two) -> None:
    """To the same path and query, on any instance, any number at once; never as a WebSocket."""
    here, there = two
    ticket = await here.issue(BOB)
    where = f"{EVENTS}?format=sse"
    many = [each.redeem(ticket, where, False) for each in (here, there) * 5]
    assert await asyncio.gather(*many) == [BOB] * 10
    for other in (EVENTS, f"{EVENTS}?format=ndjson", "/api/v1/rooms/other/events?format=sse"):
        assert await refused(there, ticket, other)
    assert await refused(there, ticket, where, socket=True)
    assert await there.redeem(ticket, where, False) == BOB


async def test_of_two_first_uses_in_different_places_one_counts(two: Two) -> None:
    here, there = two
    ticket = await here.issue(ANN)
    uses = [here.redeem(ticket, "/a", False), there.redeem(ticket, "/b", False)]
    results = await asyncio.gather(*uses, return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["Identity", "Unauthorized"]


async def test_a_ticket_for_a_path_is_good_there_only(two: Two) -> None:
    """With whatever query, unless it has one itself. A try elsewhere does not spend it."""
    here, there = two
    for path, good in ((EVENTS, f"{EVENTS}?x=1"), (f"{EVENTS}?x=1", f"{EVENTS}?x=1")):
        ticket = await here.issue(ANN, path)
        assert await refused(there, ticket, "/ws/lobby", socket=True)
        assert await refused(there, ticket, f"{EVENTS}/")
        assert path == EVENTS or await refused(there, ticket, EVENTS)
        assert await there.redeem(ticket, good, False) == ANN
    for wrong in ("api", "x" * 3000, "/" + "x" * 3000):
        with pytest.raises(InvalidField, match="path"):
            await here.issue(ANN, wrong)


async def test_a_ticket_is_fresh_for_a_moment(two: Two) -> None:
    """Once bound it lasts as long as it has a connection, and for a while after the last."""
    here, there = two
    ticket = await here.issue(ANN)
    assert tickets.FRESH - 9 < await left(here, ticket) <= tickets.FRESH
    assert await there.redeem(ticket, "/a", False) == ANN
    idle = tickets.IDLE - 9
    assert idle < await left(here, ticket) <= tickets.IDLE
    with there.held(ticket):
        await soon_gone(here, ticket)
        there.keep()
        assert await left(here, ticket) > idle
        with there.held(ticket):
            pass
        await soon_gone(here, ticket)
        there.keep()
        assert await left(there, ticket) > idle
        await soon_gone(here, ticket)
    assert await left(there, ticket) > idle
    await soon_gone(here, ticket)
    there.keep()
    assert await left(there, ticket) < 10


async def soon_gone(each: Tickets, ticket: str) -> None:
    """Nine seconds are left of it."""
    each._store.extend([tickets._hashed(ticket)], 9)
    assert await left(each, ticket) < 10


async def left(each: Tickets, ticket: str) -> float:
    """Seconds that it lasts, as things are."""
    store, name = each._store, tickets._hashed(ticket)
    if isinstance(store, Memory):
        return store._kept[name][1] - time.monotonic()
    assert isinstance(store, RedisStore)
    return float(await store._link.command("PTTL", store._key(name))) / 1000


async def test_a_ticket_that_nobody_comes_with_goes(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was used before or not."""
    here, there = two
    bound = await here.issue(ANN)
    monkeypatch.setattr(tickets, "FRESH", 0.02)
    monkeypatch.setattr(tickets, "IDLE", 0.02)
    fresh = await here.issue(ANN)
    assert await there.redeem(bound, "/a", False) == ANN
    for ticket in (fresh, bound):
        while await _there(here, ticket):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.01)
        assert await refused(there, ticket, "/a")


async def _there(each: Tickets, ticket: str) -> bool:
    """Whether it is known; to redeem it would keep it."""
    return await each._store.get(tickets._hashed(ticket)) is not None


async def test_a_ticket_ends_with_its_identity(two: Two) -> None:
    """With its expiry, and with its API key."""
    here, there = two
    soon = Identity("ann", expires=time.time() + 1)
    revoked = Identity("ann", key=b"gone")
    ticket, other = await here.issue(soon), await here.issue(revoked)
    assert await there.redeem(ticket, "/a", False) == soon
    await asyncio.sleep(max(0.0, soon.expires - time.time()) + 0.01)
    assert await refused(there, ticket, "/a") and await refused(there, other, "/a")


async def test_all_tickets_of_a_user_can_be_forgotten(two: Two) -> None:
    """Those until now, bound or not; not those of others, nor later ones."""
    here, there = two
    bound, fresh, other = await here.issue(ANN), await here.issue(ANN), await here.issue(BOB)
    assert await here.redeem(bound, "/a", False) == ANN
    await there.forget("ann")
    assert await refused(here, bound, "/a") and await refused(here, fresh, "/a", socket=True)
    assert await here.redeem(other, "/a", False) == BOB
    assert await there.redeem(await here.issue(ANN), "/a", False) == ANN


async def test_what_is_stored_does_not_tell_the_ticket() -> None:
    store = Memory()
    ticket = await Tickets(AUTH, store).issue(ANN)
    assert ticket not in repr(vars(store))


async def test_memory_is_bounded_and_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused leave for new ones; what has ended leaves by itself."""
    monkeypatch.setattr(tickets, "MOST", 10)
    store = Memory()
    each = Tickets(AUTH, store)
    used = await each.issue(ANN)
    rest = [await each.issue(ANN) for _ in range(9)]
    await each.redeem(used, "/a", False)
    rest += [await each.issue(ANN) for _ in range(9)]
    assert len(store._kept) == 10 and await each.redeem(used, "/a", False) == ANN
    assert [await _there(each, ticket) for ticket in rest] == [False] * 9 + [True] * 9
    monkeypatch.setattr(tickets, "FRESH", 0.01)
    await store.put("brief", b"", 0.01)

    def swept() -> bool:
        each.keep()
        return "brief" not in store._kept

    await until(swept)


async def test_a_ticket_is_taken_once_where_redis_answers_late(redis_server: Any) -> None:
    """A call is repeated where the answer is lost: whoever spent it is the one who gets in."""
    async with linked(redis_server()) as link:
        store = RedisStore(link)
        await store.put("t", b"old", 10)
        for new, there in ((b"mine", True), (b"mine", True), (b"another's", False)):
            assert await store.put("t", new, 10, before=b"old") is there


async def test_without_redis_it_is_not_known(redis_server: Any) -> None:
    """Which is another word than that the ticket is bad: the client is to come back."""
    redis = redis_server()
    async with linked(redis) as link:
        each = Tickets(AUTH, RedisStore(link))
        ticket = await each.issue(ANN)
        redis.kill()
        await until(lambda: not link.up)
        for attempt in (each.redeem(ticket, "/a", False), each.issue(ANN), each.forget("ann")):
            with pytest.raises(Unavailable):
                await attempt
        with each.held(ticket):
            each.keep()


def test_the_target_of_a_request() -> None:
    """Is all of it but the ticket, as it was sent."""
    assert target("/a?ticket=x") == target("/a?") == target("/a") == "/a"
    assert target("/a?b=%20&ticket=x&c=?&tickets=1") == "/a?b=%20&c=?&tickets=1"


@property_test
@given(said=st.text(), where=st.text(), socket=st.booleans())
def test_any_ticket_is_refused(said: str, where: str, socket: bool) -> None:
    """Never another exception."""
    each = Tickets(AUTH, Memory())
    assert asyncio.run(refused(each, said, target(where), socket))
