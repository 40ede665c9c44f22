"""deploy/: what it says agrees with the server; what nginx passes on, and what it never tells."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import yaml

from app import CUT_WAIT, KEEPALIVE
from handlers.gate import LINE_BYTES
from streaming.config import Config, load
from tests.conftest import StartNginx
from tests.endpoints import url_of
from tests.nginx import CONF, FRONT
from tests.people import joined, new_room
from tests.processes import ROOT, Server, until
from tests.readers import ask
from tests.sockets import closed_port

CONFIG = Config()
COMPOSE = ROOT / "deploy/compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]


def number(name: str, text: str = CONF) -> list[int]:
    """The values of this directive, in seconds or bytes."""
    found = re.findall(rf"^ *{name} (?:\d+ )?(\d+)([smk]);", text, re.MULTILINE)
    units = {"s": 1, "k": 2**10, "m": 2**20}
    return [int(value) * units[unit] for value, unit in found]


# --- the files ----------------------------------------------------------------------------------


def test_nginx_waits_longer_than_the_server() -> None:
    """A stream is silent for a heartbeat at most, NDJSON and text for as long as the model may be;
    an answer in one piece for the time of the whole. The nginx in front waits longest.
    """
    streams, whole = number("proxy_read_timeout")
    (front,) = number("proxy_read_timeout", FRONT)
    generation = CONFIG.generation
    assert streams > 2 * CONFIG.delivery.heartbeat
    assert streams > max(generation.first_token_timeout, generation.idle_timeout)
    assert streams > generation.commit_after
    assert whole > generation.total_timeout
    assert front > whole


def test_nginx_takes_what_the_server_takes() -> None:
    """The largest body, the longest first line."""
    assert number("client_max_body_size") == [CONFIG.limits.body_bytes]
    for text in (CONF, FRONT):
        assert number("large_client_header_buffers", text) == [LINE_BYTES]


def test_nginx_gives_up_idle_connections_first() -> None:
    """So that no request meets a connection that the server is closing: a POST would be lost."""
    for text in (CONF, FRONT):
        (kept,) = number("keepalive_timeout", text)
        assert kept < KEEPALIVE


def variables_of(service: dict[str, Any]) -> dict[str, str]:
    """Its environment, where the one of Compose itself sets nothing."""
    given = service["environment"].items()
    return {key: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for key, value in given}


def test_compose_sets_keys_that_exist() -> None:
    """Every variable is taken; the instances are the ones that nginx asks, at their port, and the
    Redis is the one there.
    """
    named = re.findall(r"^ +server ([\w-]+):(\d+)", CONF, re.MULTILINE)
    assert len(named) == 2
    for name, port in named:
        config = load(None, variables_of(SERVICES[name]))
        assert (config.server.host, config.server.port) == ("0.0.0.0", int(port))
        assert urlsplit(config.redis.url).hostname in SERVICES


def test_compose_names_what_there_is() -> None:
    """The Dockerfile, nginx' file at its place, and every service that another waits for, which
    has a check of its health then. The port outside leads to where nginx listens.
    """
    for service in SERVICES.values():
        for other, wait in service.get("depends_on", {}).items():
            assert wait == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other] or "build" in SERVICES[other]
        if "build" in service:
            assert (
                "\nHEALTHCHECK " in (COMPOSE.parent / service["build"] / "Dockerfile").read_text()
            )
    front = SERVICES["nginx"]
    for volume in front["volumes"]:
        assert (COMPOSE.parent / volume.split(":")[0]).is_file()
    assert [port.rpartition(":")[2] for port in front["ports"]] == ["80"]
    assert "listen 80;" in CONF


def test_compose_lets_nothing_be_written() -> None:
    """But where nginx has its pid and its buffers; and an instance has no rights to give up."""
    instances = [service for service in SERVICES.values() if "build" in service]
    for instance in instances:
        assert (instance["read_only"], instance["cap_drop"]) == (True, ["ALL"])
    (pid,) = re.findall(r"^pid (\S+)/", CONF, re.MULTILINE)
    assert {pid, "/var/cache/nginx"} == set(SERVICES["nginx"]["tmpfs"])


def test_compose_waits_for_the_drain() -> None:
    """An instance that is stopped has the time to let its answers end, and to cut the others."""
    for service in SERVICES.values():
        if "build" in service:
            seconds = int(service["stop_grace_period"].removesuffix("s"))
            assert seconds > CONFIG.server.drain + 2 * CUT_WAIT


# --- what is passed on --------------------------------------------------------------------------


@asynccontextmanager
async def recorder() -> AsyncIterator[tuple[str, list[dict[str, str]], list[asyncio.Task[None]]]]:
    """An instance that only remembers: its URL, the headers of each request ("": its first line),
    and its connections.
    """
    seen: list[dict[str, str]] = []
    connections: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                pairs = (line.partition(": ") for line in head[1:] if line)
                seen.append({"": head[0], **{key.lower(): value for key, _, value in pairs}})
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.ensure_future(serve(reader, writer)))

    listener = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", seen, connections
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections)


async def test_the_client_is_who_it_is(nginx: StartNginx) -> None:
    """Its address and its scheme, and no other that it claims; Host, with the port, is the one that
    it asked for; what it says to nginx alone stays there. Path and query go on as they came.
    """
    claims = {"X-Forwarded-For": "203.0.113.9", "TE": "trailers", "Upgrade": "h2c"}
    client = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
    async with recorder() as (url, seen, _), aiohttp.ClientSession(connector=client) as session:
        way = nginx(url)
        target = f"{way.url}/api/v1/rooms/a%2Fb//c/events?ticket=t%20t"
        async with session.get(target, headers=claims) as answer:
            assert await answer.text() == "ok"
    (headers,) = seen
    assert headers["x-forwarded-for"] == "127.0.0.2"
    assert headers["x-forwarded-proto"] == "http"
    assert headers["host"] == way.url.removeprefix("http://")
    assert headers[""].endswith(" HTTP/1.1")
    assert headers.keys().isdisjoint({"upgrade", "connection"})


async def test_a_websocket_asks_for_its_upgrade(nginx: StartNginx) -> None:
    """However it is spelled; nothing else does."""
    async with recorder() as (url, seen, _):
        way = nginx(url)
        for sent in ("websocket", "WebSocket"):
            headers = {"Upgrade": sent, "Connection": "keep-alive, Upgrade"}
            async with ask("GET", f"{way.url}/ws/room", headers=headers) as answer:
                assert answer.status == 200
    assert {(each["upgrade"], each["connection"]) for each in seen} == {("websocket", "upgrade")}


async def test_connections_to_the_instances_are_kept(nginx: StartNginx) -> None:
    """As many as nginx has workers are enough for clients one after the other."""
    async with recorder() as (url, seen, connections):
        way = nginx(url)
        for _ in range(60):
            async with ask("POST", f"{way.url}/stream", json_body={"prompt": "x"}) as answer:
                assert await answer.body() == b"ok"
    assert len(seen) == 60
    assert len(connections) < 30


async def test_metrics_are_not_for_everybody(nginx: StartNginx, demo_server: Server) -> None:
    """They are asked of each instance, from inside."""
    async with ask("GET", f"{nginx(demo_server.url).url}/metrics") as answer:
        assert answer.status == 404
        assert "x-request-id" not in answer.headers  # the instance was not asked


async def test_no_query_is_ever_logged(nginx: StartNginx, demo_server: Server) -> None:
    """Of streams, WebSockets, aborts, refusals, and instances that are away: in no log of nginx's,
    that of errors neither. Each request is one line, with its path.
    """
    way = nginx(demo_server.url, f"http://127.0.0.1:{closed_port()}")
    secret = "s3cr3t-t1ck3t"
    query, room = {"ticket": secret, "prompt": "hi"}, new_room()
    async with ask("GET", url_of(way.url, "/stream", **query)) as answer:
        await answer.body()
    async with ask("GET", url_of(way.url, "/chat", model="demo:delay=600", **query)) as answer:
        answer.connection.cut(rst=True)
    async with joined(way.url, room, user=secret):
        pass
    large = {"Content-Length": str(2**30)}
    referer = {"Referer": url_of(way.url, "/page", **query)}
    async with ask("POST", url_of(way.url, "/late", **query), headers=large | referer) as answer:
        assert answer.status == 413
    away = nginx(f"http://127.0.0.1:{closed_port()}")
    async with ask("GET", url_of(away.url, "/away", **query), headers=referer) as answer:
        assert answer.status == 502
    paths = {"/stream", "/chat", f"/ws/{room}", "/late"}
    for each in way.nginxes:
        await until(lambda each=each: len(each.lines()) == 4)  # type: ignore[misc]
        assert {line["path"] for line in each.lines()} == paths
    for each in away.nginxes:
        await until(each.lines)
        assert each.lines()[0]["path"] == "/away"
    for each in way.nginxes + away.nginxes:
        assert secret not in each.access.read_text() + "\n".join(each.stderr)
