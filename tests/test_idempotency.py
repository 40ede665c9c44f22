"""`Idempotency-Key` on starting a generation: the same key finds the same answer (design, section
3). Single flight is such a key, made by the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import app
from streaming import config, producer
from tests.behaviour import expected
from tests.clients import (
    JSON_PATHS,
    KINDS,
    PROMPT,
    Kind,
    Seen,
    asked,
    named,
    once,
    see,
    start,
    status,
    stop,
    whole,
)
from tests.inside import in_process
from tests.processes import Server, UpstreamProcess, until
from tests.readers import Sse, ask

StartServer = Callable[..., Server]
CONTENT, CHAT, OPENAI = Kind("content"), Kind("chat"), Kind("openai")
LONG = "tokens=5000,rate=100"
STARTING = [kind for kind in KINDS if kind.dialect != "native"]


def keyed(key: str, user: str = "ada") -> dict[str, str]:
    return {"Idempotency-Key": key, "X-User-Id": user}


def check_whole(seen: Seen, model: str) -> None:
    assert (seen.status, seen.ending) == (200, "finished")
    assert seen.text == expected(model, PROMPT)


async def test_the_same_request_attaches(relay_server: Server, upstream: UpstreamProcess) -> None:
    """While the answer runs and after its end, the same key and body give the same stream from its
    start, whatever the client; the upstream is asked once.
    """
    url = relay_server.url

    async def thrice(kind: Kind) -> None:
        model, key = named("tokens=40,rate=100"), f"attach {kind}".replace(" ", "-")
        async with asked(url, kind, model, headers=keyed(key)) as first:
            second = await start(url, kind, model, headers=keyed(key))
            everyone = [await see(kind, first), second]
        everyone.append(await start(url, kind, model, headers=keyed(key)))
        for seen in everyone:
            check_whole(seen, model)
        assert len({seen.stream_id for seen in everyone}) == 1
        assert len({seen.headers.get("x-conversation-id") for seen in everyone}) == 1
        assert len(upstream.log(model)) == 1

    await asyncio.gather(*map(thrice, STARTING))


@pytest.mark.parametrize("path", JSON_PATHS)
async def test_many_at_once(relay_server: Server, upstream: UpstreamProcess, path: str) -> None:
    """Equal requests that come together, for an answer in one piece too, make one upstream call."""
    model = named("tokens=20,rate=100")
    asking = (whole(relay_server.url, path, model, headers=keyed("many")) for _ in range(20))
    answers = await asyncio.gather(*asking)
    for seen in answers:
        check_whole(seen, model)
    assert len({seen.stream_id for seen in answers}) == 1
    assert len(upstream.log(model)) == 1


async def test_a_retry_after_a_cut(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A client that lost its connection and knows no position asks again, and gets the answer."""
    url, model = relay_server.url, named("tokens=60,rate=100")
    async with asked(url, CHAT, model, headers=keyed("again")) as first:
        await first.read(Sse(), cut_after=1500)
    check_whole(await start(url, CHAT, model, headers=keyed("again")), model)
    assert len(upstream.log(model)) == 1


async def test_the_order_of_fields_is_nothing(relay_server: Server) -> None:
    """The same body is the same JSON value, however it is written."""
    url, model = f"{relay_server.url}/api/v1/generate", named("tokens=5")
    texts = (
        f'{{"prompt": "{PROMPT}", "model": "{model}"}}',
        f'{{ "model":"{model}",\n "prompt":"{PROMPT}" }}',
    )
    ids = set()
    for text in texts:
        async with ask("POST", url, headers=keyed("order"), body=text.encode()) as answer:
            assert answer.status == 200
            ids.add(answer.headers["x-stream-id"])
    assert len(ids) == 1


async def test_another_body(relay_server: Server, upstream: UpstreamProcess) -> None:
    """The same key with another body is 422 and starts nothing, while the answer runs and after
    its end.
    """
    url, model, other = relay_server.url, named("tokens=20,rate=100"), named("tokens=5")

    async def refused() -> None:
        for kind, path in ((CHAT, ""), (OPENAI, ""), (CONTENT, JSON_PATHS[0])):
            headers = keyed(f"body-{kind.dialect}")
            seen = await (
                whole(url, path, other, headers=headers)
                if path
                else start(url, kind, other, headers=headers)
            )
            error = seen.items[0]["error"]
            assert (seen.status, seen.code) == (422, "invalid_field")
            assert error["param"] == "Idempotency-Key"
            assert "Idempotency-Key" in error["message"]

    async with (
        asked(url, CHAT, model, headers=keyed("body-chat")) as chat,
        asked(url, OPENAI, model, headers=keyed("body-openai")) as openai,
    ):
        await whole(url, JSON_PATHS[0], model, headers=keyed("body-content"))
        await refused()
        for kind, answer in ((CHAT, chat), (OPENAI, openai)):
            check_whole(await see(kind, answer), model)
    await refused()
    assert upstream.log(other) == []


async def test_a_key_that_is_none(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A key is 1 to 255 visible ASCII characters."""
    model = named("tokens=5")
    for key in ("a b", "k" * 256, "schl\u00fcssel"):
        seen = await start(relay_server.url, CONTENT, model, headers=keyed(key))
        assert (seen.status, seen.items[0]["error"]["param"]) == (422, "Idempotency-Key")
    assert upstream.log(model) == []
    check_whole(await start(relay_server.url, CONTENT, model, headers=keyed("k" * 255)), model)


async def test_whose_key_and_where(relay_server: Server, upstream: UpstreamProcess) -> None:
    """A key counts for one user and one route: elsewhere the same word is another key."""
    url, model = relay_server.url, named("tokens=5")
    ids = set()
    for user in ("ada", "eve"):
        for kind in (CONTENT, CHAT, OPENAI):
            seen = await start(url, kind, model, headers=keyed("scope", user))
            check_whole(seen, model)
            ids.add(seen.stream_id)
    assert len(ids) == len(upstream.log(model)) == 6


async def test_a_conversation_hears_it_once(
    relay_server: Server, upstream: UpstreamProcess
) -> None:
    """A message that is sent again under its key is not said again."""
    url, model = relay_server.url, named("tokens=5")
    for key in ("hello", "hello", "next"):
        headers = keyed(f"conversation-{key}")
        seen = await start(url, CHAT, model, headers=headers, conversation_id="once", message=key)
        assert seen.ending == "finished"
    said = upstream.log(model)[-1]["body"]["messages"]
    assert [(message["role"], message["content"]) for message in said] == [
        ("user", "hello"),
        ("assistant", expected(model, "hello")),
        ("user", "next"),
    ]


async def test_failed_frees_the_key(relay_server: Server, upstream: UpstreamProcess) -> None:
    """Who asks again after a failure gets another try."""
    for kind in (CONTENT, CHAT, OPENAI):
        model = named("status=400,then,reset=3,then,tokens=5")
        headers = keyed(f"failed-{kind.dialect}")
        seen = [await start(relay_server.url, kind, model, headers=headers) for _ in range(3)]
        assert [each.ending for each in seen] == ["failed", "failed", "finished"]
        check_whole(seen[-1], model)
        assert len(upstream.log(model)) == 3


async def test_stopped_keeps_the_key(relay_server: Server, upstream: UpstreamProcess) -> None:
    """What was stopped by a call was wanted so: asking again shows the same cancelled answer."""
    url, model = relay_server.url, named(LONG)
    async with asked(url, CHAT, model, headers=keyed("stopped")) as answer:
        stream_id = answer.headers["x-stream-id"]
        await upstream.requests(model)
        await stop(url, stream_id, **{"X-User-Id": "ada"})
        first = await see(CHAT, answer)
    again = await start(url, CHAT, model, headers=keyed("stopped"))
    assert (again.ending, again.text, again.stream_id) == ("cancelled", first.text, stream_id)
    assert len(upstream.log(model)) == 1


async def test_a_key_lingers(server: StartServer, upstream: UpstreamProcess) -> None:
    """An answer with a key outlives a short `linger`, and that of the OpenAI clients, which is
    none: whoever sends a key means to come back. One without a key does not.
    """
    process = server(
        server={"drain": 0},
        model={"name": "up:", "base_url": upstream.base},
        generation={"linger": 0.2},
    )
    url, ada = process.url, {"X-User-Id": "ada"}
    for kind in (CHAT, OPENAI):
        ids = []
        for headers in (keyed("lingers"), ada):
            async with asked(url, kind, named(LONG), headers=headers) as answer:
                ids.append(answer.headers["x-stream-id"])
        await once(url, ids[1], "state", "cancelled", **ada)
        assert (await status(url, ids[0], **ada))["state"] == "running"  # though left before


async def test_abandoned_frees_the_key(
    upstream: UpstreamProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that was cancelled because nobody read it is made anew for who asks again. (In this
    process, with a shorter wait than the minute that a key lingers.)
    """
    monkeypatch.setattr(producer, "KEYED_LINGER", 0.2)
    relaying = config.Config(
        model=config.Model(name="up:", base_url=upstream.base),
        generation=config.Generation(linger=0.1),
    )
    model = named(f"{LONG},then,tokens=5")
    async with in_process(app.build(relaying)) as url:
        async with asked(url, CHAT, model, headers=keyed("abandoned")) as answer:
            await upstream.requests(model)
        await upstream.requests(model, closed=True)
        again = await start(url, CHAT, model, headers=keyed("abandoned"))
        check_whole(again, model)
        assert again.stream_id != answer.headers["x-stream-id"]


async def test_a_key_goes_with_its_answer(server: StartServer, upstream: UpstreamProcess) -> None:
    """When the answer is no longer kept, the key is free."""
    process = server(
        model={"name": "up:", "base_url": upstream.base}, generation={"retained_bytes": 0}
    )
    model = named("tokens=5")
    seen = [await start(process.url, CHAT, model, headers=keyed("kept")) for _ in range(2)]
    for each in seen:
        check_whole(each, model)
    assert seen[0].stream_id != seen[1].stream_id


# --- single flight ------------------------------------------------------------------------------


async def pair(url: str, kind: Kind, model: str, users: tuple[str, str]) -> list[Seen]:
    """What two see who ask the same, the second when the first's answer has begun."""
    headers: list[dict[str, Any]] = [{"X-User-Id": user} for user in users]
    async with asked(url, kind, model, headers=headers[0]) as first:
        second = await start(url, kind, model, headers=headers[1])
        return [await see(kind, first), second]


async def test_single_flight(server: StartServer, upstream: UpstreamProcess) -> None:
    """Where it is on, equal requests of one user share the answer while it runs, and not after;
    those of two users never.
    """
    url = server(
        model={"name": "up:", "base_url": upstream.base}, generation={"single_flight": True}
    ).url

    async def flights(kind: Kind) -> None:
        model, other = named("tokens=40,rate=100"), named("tokens=40,rate=100")
        same = await pair(url, kind, model, ("ada", "ada"))
        assert same[0].stream_id == same[1].stream_id
        assert len(upstream.log(model)) == 1
        later = await start(url, kind, model, headers={"X-User-Id": "ada"})
        assert later.stream_id != same[0].stream_id
        two = await pair(url, kind, other, ("ada", "eve"))
        assert two[0].stream_id != two[1].stream_id
        for seen in (*same, later):
            check_whole(seen, model)
        for seen in two:
            check_whole(seen, other)

    await asyncio.gather(*map(flights, (CONTENT, CHAT, Kind("tool"), OPENAI)))


async def test_a_flight_goes_on_without_the_first(
    server: StartServer, upstream: UpstreamProcess
) -> None:
    """Who joined keeps it, though the one who started it has gone."""
    url = server(
        model={"name": "up:", "base_url": upstream.base}, generation={"single_flight": True}
    ).url
    model = named("tokens=60,rate=60")
    async with asked(url, OPENAI, model) as first:
        joining = asyncio.create_task(start(url, OPENAI, model))
        await first.read(Sse(), cut_after=500)
    check_whole(await joining, model)
    assert len(upstream.log(model)) == 1


async def test_no_flight(relay_server: Server, upstream: UpstreamProcess) -> None:
    """Where it is off, which is the default, equal requests are two."""
    model = named("tokens=20,rate=100")
    two = await pair(relay_server.url, CHAT, model, ("ada", "ada"))
    assert two[0].stream_id != two[1].stream_id
    await until(lambda: len(upstream.log(model)) == 2)
