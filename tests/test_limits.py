"""Limits: rates, connections and running answers; in this process and on all instances together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from app import build
from streaming import config, limits
from streaming.errors import TooMany, Unavailable
from streaming.limits import Limits, Quota, client_ip
from streaming.redis_doors import RedisCounts
from streaming.redis_link import Link
from streaming.schema import network
from tests.inside import in_process
from tests.processes import until
from tests.properties import property_test
from tests.raw_socket import dialled
from tests.readers import ask
from tests.redis_server import RedisServer
from tests.test_tickets import linked
from tests.tokens import SECRET, bearer, token


def limited(**given: int) -> Limits:
    return Limits(config.Limits(**given))


async def refusal(attempt: Any) -> tuple[int, str]:
    """Status and code with which it is refused; it says when to come back."""
    with pytest.raises((TooMany, Unavailable)) as refused:
        await attempt
    assert refused.value.retry_after is not None and refused.value.retry_after > 0
    return refused.value.status, refused.value.code


# Rates


async def test_a_rate_is_of_a_user_and_a_kind() -> None:
    """So many in a minute from the first, then 429 until the minute is over."""
    each = limited(generations_per_minute=3, requests_per_minute=1)
    quotas = [await each.take("generations", "ann") for _ in range(3)]
    assert [quota and (quota.limit, quota.remaining) for quota in quotas] == [
        (3, 2),
        (3, 1),
        (3, 0),
    ]
    assert quotas[0] is not None and 59 < quotas[0].reset <= 60
    assert quotas[0].headers() == {
        "RateLimit-Limit": "3",
        "RateLimit-Remaining": "2",
        "RateLimit-Reset": "60",
    }
    assert Quota(3, 2, 59.1).headers()["RateLimit-Reset"] == "60", "not before it is there"
    assert await refusal(each.take("generations", "ann")) == (429, "rate_limited")
    assert await each.take("requests", "ann") and await each.take("generations", "bob")
    assert await refusal(each.take("requests", "ann")) == (429, "rate_limited")


async def test_a_window_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of it is kept."""
    monkeypatch.setattr(limits, "WINDOW", 0.5)
    each = limited(generations_per_minute=1)
    for user in ("ann", "bob", "cy"):
        await each.take("generations", user)
    with pytest.raises(TooMany) as refused:
        await each.take("generations", "ann")
    await asyncio.sleep((refused.value.retry_after or 0) + 0.01)
    assert await each.take("generations", "ann")
    assert {user for _, user in each._windows} <= {"ann", "cy"}


async def test_there_are_no_rates_in_open_mode() -> None:
    """Nor where they are 0."""
    each = Limits(config.Limits(generations_per_minute=1, requests_per_minute=1), rates=False)
    for _ in range(3):
        assert await each.take("generations", "ann") is None
        assert await each.take("requests", "ann") is None
    assert await limited(generations_per_minute=0).take("generations", "ann") is None


async def test_a_frame_is_a_request() -> None:
    """Each that does something. One too many is told when to come back; the socket stays where it
    is, and hears what others say.
    """
    auth = config.Auth(mode="token", jwt_secret=SECRET)
    app = build(config.Config(auth=auth, limits=config.Limits(requests_per_minute=4)))
    ann, bob = bearer(token("ann")), bearer(token("bob"))
    async with in_process(app) as url, dialled(url, "/ws/hall", headers=ann) as socket:
        for ref in range(3):  # its handshake is the first
            await socket.say(type="ping")
            await socket.say(type="authenticate", token=token("ann"))
            await socket.say(type="presence", ref=ref)
            assert (await socket.hear("presence"))["ref"] == ref
        await socket.say(type="message", content="one too many", ref="x")
        error = await socket.hear("error")
        assert (error["code"], error["ref"]) == ("rate_limited", "x")
        assert 50 < error["retry_after"] <= 60
        await socket.say(type="ping", ref="there")
        assert (await socket.hear("pong"))["ref"] == "there"
        path = f"{url}/api/v1/rooms/hall"
        async with ask("GET", f"{path}/presence", headers=ann) as answer:
            assert answer.status == 429
        said = {"content": "hello"}
        async with ask("POST", f"{path}/messages", headers=bob, json_body=said) as answer:
            assert answer.status == 201
        assert (await socket.hear("message"))["content"] == "hello"


async def test_a_refusal_tells_of_the_rate_that_is_over() -> None:
    """And not of another, of which something is left."""
    auth = config.Auth(mode="token", jwt_secret=SECRET)
    rates = config.Limits(requests_per_minute=10, generations_per_minute=1)
    body, headers = {"prompt": "x", "model": "demo:tokens=1"}, bearer(token("ann"))
    async with in_process(build(config.Config(auth=auth, limits=rates))) as url:
        for status in (200, 429):
            asked = ask("POST", f"{url}/api/v1/generate", headers=headers, json_body=body)
            async with asked as answer:
                assert answer.status == status
                assert answer.headers["ratelimit-limit"] == "1"
                assert answer.headers["ratelimit-remaining"] == "0"


async def test_nobody_is_told_to_come_back_too_early() -> None:
    """Parts of a second count as a whole one."""

    async def refuse(request: web.Request) -> web.Response:
        raise TooMany("not now", retry_after=1.2)

    app = build(config.Config())
    app.router.add_get("/refuse", refuse)
    async with in_process(app) as url, ask("GET", f"{url}/refuse") as answer:
        assert (answer.status, answer.headers["retry-after"]) == (429, "2")


# What is open at once


async def test_connections_of_this_process() -> None:
    """One too many is 503; those that are there stay, and one that goes makes room."""
    each = limited(connections=2)
    for ip in ("10.0.0.1", "10.0.0.2"):
        each.enter(ip)
    with pytest.raises(Unavailable) as refused:
        each.enter("10.0.0.3")
    assert (refused.value.code, refused.value.retry_after) == ("overloaded", limits.RETRY)
    assert each.connections == 2
    each.leave("10.0.0.1")
    each.enter("10.0.0.3")


def test_connections_from_an_address() -> None:
    """Of IPv6 a client has a whole /64."""
    each = limited(connections_per_ip=1, connections=0)
    pairs = [("10.0.0.1", "::ffff:10.0.0.1"), ("2001:db8::1", "2001:db8::ffff:1"), ("", "")]
    for one, same in pairs:
        each.enter(one)
        with pytest.raises(TooMany, match="1 connections"):
            each.enter(same)
    for another in ("10.0.0.2", "2001:db8:0:1::1"):
        each.enter(another)
    for ip in ("10.0.0.1", "2001:db8::1", "", "10.0.0.2", "2001:db8:0:1::1"):
        each.leave(ip)
    assert each.connections == 0 and not each._addresses


@pytest.mark.parametrize(
    ("kind", "key", "code"),
    [
        ("connections", "connections_per_user", "too_many_connections"),
        ("running", "running_per_user", "too_many_running"),
    ],
)
async def test_what_a_user_may_have(kind: str, key: str, code: str) -> None:
    """One too many is 429; another user has their own."""
    each = limited(**{key: 2})
    for _ in range(2):
        await each.acquire(kind, "ann")
    assert await refusal(each.acquire(kind, "ann")) == (429, code)
    await each.acquire(kind, "bob")
    each.release(kind, "ann")
    await each.acquire(kind, "ann")
    for user in ("ann", "ann", "bob"):
        each.release(kind, user)
    assert not each._counts


async def test_nothing_is_counted_without_a_limit() -> None:
    each = limited()
    for _ in range(100):
        await each.acquire("running", "ann")
    each.release("running", "ann")
    assert not each._counts


# On all instances together


class Instance:
    """One of several. Its lease is renewed only by `renew`."""

    def __init__(self, link: Link, redis: RedisServer, cfg: config.Limits) -> None:
        self.counts = RedisCounts(link)
        self.limits = Limits(cfg, shared=self.counts)
        self.link, self.redis = link, redis
        self.renew()

    def renew(self, milliseconds: int = 60_000) -> None:
        self.redis.call("SET", self.link.instance(self.link.me), 1, "PX", milliseconds)

    async def said(self) -> None:
        """What it has told is in Redis: calls keep their order."""
        await self.link.command("EXISTS", "r:any")


Start = Callable[..., Any]


@asynccontextmanager
async def pair(redis: RedisServer, **given: int) -> AsyncIterator[tuple[Instance, Instance]]:
    cfg = config.Limits(**given)
    async with linked(redis) as one, linked(redis) as other:
        yield Instance(one, redis, cfg), Instance(other, redis, cfg)


async def test_a_rate_counts_on_all_instances(
    redis_server: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = redis_server()
    async with pair(redis, generations_per_minute=4) as (a, b):
        for n, each in enumerate((a, b, a, b)):
            quota = await each.limits.take("generations", "a:n{n}")
            assert quota is not None and quota.remaining == 3 - n and 50 < quota.reset <= 60
        for each in (a, b):
            assert await refusal(each.limits.take("generations", "a:n{n}")) == (429, "rate_limited")
        assert await a.limits.take("generations", "bob")
        assert all("{" in name for name in redis.names("r:rate*"))
        assert all(0 < redis.call("PTTL", name) <= 60_000 for name in redis.names("r:rate*"))


async def test_what_a_user_has_counts_on_all_instances(redis_server: Start) -> None:
    """And leaves nothing behind."""
    redis = redis_server()
    async with pair(redis, connections_per_user=3, running_per_user=1) as (a, b):
        for each in (a, b, a):
            await each.limits.acquire("connections", "ann")
            await each.said()
        for each in (a, b):
            assert await refusal(each.limits.acquire("connections", "ann")) == (
                429,
                "too_many_connections",
            )
        await b.limits.acquire("running", "ann")
        await b.said()
        with pytest.raises(TooMany):
            await a.limits.acquire("running", "ann")
        a.limits.release("connections", "ann")
        await a.said()
        await b.limits.acquire("connections", "ann")
        a.limits.release("connections", "ann")
        b.limits.release("connections", "ann")
        b.limits.release("connections", "ann")
        b.limits.release("running", "ann")
        await asyncio.gather(a.said(), b.said())
        assert redis.names("r:count*") == [] and not a.counts._here and not b.counts._here


async def test_what_a_lost_instance_had_is_given_back(redis_server: Start) -> None:
    """Once its lease is over; and counts again where it was not lost after all."""
    redis = redis_server()
    async with pair(redis, connections_per_user=1) as (a, b):
        await a.limits.acquire("connections", "ann")
        await a.said()
        with pytest.raises(TooMany):
            await b.limits.acquire("connections", "ann")
        a.renew(1)
        await until(lambda: redis.call("EXISTS", "r:{instance}:a") == 0)
        await b.limits.acquire("connections", "ann")
        b.limits.release("connections", "ann")
        await b.said()
        assert redis.names("r:count*") == []
        a.renew()
        a.counts.restored()
        await a.said()
        with pytest.raises(TooMany):
            await b.limits.acquire("connections", "ann")


async def test_without_redis_the_counts_here_decide(redis_server: Start) -> None:
    """Nobody is refused because it is away; what has changed meanwhile is told when it is back."""
    redis = redis_server()
    async with pair(redis, connections_per_user=2, generations_per_minute=2) as (a, b):
        await a.limits.acquire("connections", "ann")
        await a.limits.acquire("connections", "bob")
        await a.limits.take("generations", "ann")
        await a.said()
        redis.stop()
        await until(lambda: not a.link.up)
        assert await a.limits.take("generations", "ann")
        assert await refusal(a.limits.take("generations", "ann")) == (429, "rate_limited")
        await a.limits.acquire("connections", "ann")
        assert await refusal(a.limits.acquire("connections", "ann")) == (
            429,
            "too_many_connections",
        )
        a.limits.release("connections", "bob")
        redis.start()
        await until(lambda: a.link.up and b.link.up)
        a.renew()
        a.counts.restored()
        await a.said()
        with pytest.raises(TooMany):
            await b.limits.acquire("connections", "ann")
        assert redis.names("r:count*") == ["r:count:{connections:ann}"]


async def test_what_did_not_come_through_is_said_again(redis_server: Start, wire: Start) -> None:
    """A connection that went while Redis was cut off does not count for ever."""
    redis = redis_server()
    between = await wire(redis)
    async with linked(between) as link:
        a = Instance(link, redis, config.Limits(connections_per_user=2))
        await a.limits.acquire("connections", "ann")
        await a.said()
        between.cut()
        a.limits.release("connections", "ann")
        await until(lambda: bool(a.counts._unsaid))
        between.mend()
        await until(lambda: link.up)
        a.counts.tend()
        await a.said()
        assert redis.names("r:count*") == []


async def test_a_redis_that_does_not_answer_keeps_nobody_waiting(redis_server: Start) -> None:
    redis = redis_server()
    async with pair(redis, connections_per_user=1) as (a, _):
        redis.freeze()
        try:
            async with asyncio.timeout(3):  # less than the link itself is patient
                await a.limits.acquire("connections", "ann")
            with pytest.raises(TooMany):
                await a.limits.acquire("connections", "ann")
        finally:
            redis.thaw()


# Whose address it is


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("9.9.9.9", "", "9.9.9.9"),
        ("9.9.9.9", "1.1.1.1", "9.9.9.9"),  # anybody may say so
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "1.1.1.1", "1.1.1.1"),
        ("::ffff:10.0.0.1", "1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", "6.6.6.6, 1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", "6.6.6.6, 1.1.1.1,10.0.0.2", "1.1.1.1"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "1.1.1.1, unknown", "10.0.0.1"),
        ("10.0.0.1", "2001:DB8::1", "2001:db8::1"),
        ("", "1.1.1.1", ""),
    ],
)
def test_who_is_behind_a_proxy(peer: str, forwarded: str, client: str) -> None:
    """Only what a trusted proxy says counts, from the last on."""
    assert client_ip(peer, forwarded, [network("10.0.0.0/8")]) == client
    assert client_ip(peer, forwarded, []) == peer


@property_test
@given(peer=st.text() | st.ip_addresses().map(str), forwarded=st.text("0123456789.:, af"))
def test_any_header_gives_an_address(peer: str, forwarded: str) -> None:
    """Or the peer's own."""
    each = limited(connections_per_ip=1)
    client = client_ip(peer, forwarded, [network("0.0.0.0/0"), network("::/0")])
    each.enter(client)
    each.leave(client)
    assert not each._addresses
