"""Several upstreams by name: which model name leads where, and what happens where one fails
(design, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from tests.behaviour import expected
from tests.clients import DONE, PROMPT, Kind, Seen, named, start, status
from tests.processes import Server, UpstreamProcess
from tests.readers import ask
from tests.sockets import closed_port

StartServer = Callable[..., Server]
CONTENT, CHAT, NATIVE, OPENAI = Kind("content"), Kind("chat"), Kind("native"), Kind("openai")
QUICK = {"backoff": 0.01, "backoff_max": 0.02, "retries": 2}


def row(name: str, base_url: str, models: list[str], **more: Any) -> dict[str, Any]:
    """One [[upstreams]] table, with a key of its own."""
    return {"name": name, "base_url": base_url, "api_key": f"sk-{name}", "models": models, **more}


def check_whole(seen: Seen, model: str) -> None:
    assert (seen.status, seen.ending, seen.text) == (200, "finished", expected(model, PROMPT))


def tries(upstream: UpstreamProcess, *models: str) -> list[int]:
    """How often the upstream was asked for each of these models."""
    return [len(upstream.log(model)) for model in models]


async def listed(url: str) -> list[str]:
    async with ask("GET", f"{url}/v1/models") as answer:
        return [model["id"] for model in (await answer.json())["data"]]


async def test_names_lead_to_upstreams(server: StartServer, upstream: UpstreamProcess) -> None:
    """A listed name goes to its upstream with that upstream's own key, every other name to the
    default as it is, and no name to the default by the name of the default.
    """
    default, other, one, two = (named("tokens=5") for _ in range(4))
    process = server(
        model={"name": default, "base_url": upstream.base, "api_key": "sk-default"},
        upstreams=[row("one", upstream.base, [one]), row("two", upstream.base, [two])],
    )
    for model, key in ((one, "one"), (two, "two"), (default, "default"), (other, "default")):
        check_whole(await start(process.url, CONTENT, model), model)
        (request,) = upstream.log(model)
        assert request["authorization"] == f"Bearer sk-{key}"
    for empty in ({"prompt": PROMPT}, {"prompt": PROMPT, "model": None}):
        async with ask("POST", f"{process.url}/api/v1/generate", json_body=empty) as answer:
            assert (await answer.json())["text"] == expected(default, PROMPT)
    assert tries(upstream, default) == [3]
    assert await listed(process.url) == [default, one, two]


async def test_a_key_goes_to_nobody_else(server: StartServer, upstream: UpstreamProcess) -> None:
    """The default's key, from the environment too, is never sent to another upstream, also not to
    one that has none, and not in a fallback from one to the other.
    """
    first, second, plain = named("status=500"), named("status=500"), named("tokens=5")
    process = server(
        env={"OPENAI_API_KEY": "sk-environment"},
        model={"name": "up:", "base_url": upstream.base},
        upstreams=[
            row("first", upstream.base, [first], fallbacks=[second, plain, "up:"]),
            row("second", upstream.base, [second]),
            row("plain", upstream.base, [plain], api_key=""),
        ],
        generation={**QUICK, "retries": 0},
    )
    check_whole(await start(process.url, CHAT, first), plain)
    unlisted = named("tokens=5")
    check_whole(await start(process.url, CHAT, unlisted), unlisted)
    keys = [upstream.log(m)[0]["authorization"] for m in (first, second, plain, unlisted)]
    assert keys == ["Bearer sk-first", "Bearer sk-second", "Bearer none", "Bearer sk-environment"]


async def test_retries_then_fallbacks(server: StartServer, upstream: UpstreamProcess) -> None:
    """A model that fails is tried again, later each time, then the next in order; the first that
    answers is the one whose name is told.
    """
    main, second, third, never = map(named, ("status=500", "reset=0", "u2028,tokens=5", "tokens=5"))
    config = {"backoff": 0.2, "backoff_max": 0.3, "retries": 3}
    process = server(
        model={"name": "up:", "base_url": upstream.base},
        upstreams=[
            row("a", upstream.base, [main], fallbacks=[second, third, never]),
            row("b", upstream.base, [second, third, never]),
        ],
        generation=config,
    )
    seen = await start(process.url, CHAT, main)
    check_whole(seen, third)
    assert tries(upstream, main, second, third, never) == [4, 4, 1, 0]
    log = [request for model in (main, second, third) for request in upstream.log(model)]
    opened = [request["opened_at"] for request in log]
    assert opened == sorted(opened)
    gaps = [after - before for before, after in pairwise(opened[:4])]
    for gap, least in zip(gaps, (0.1, 0.15, 0.15), strict=True):  # half the wait is the least
        assert least <= gap < 5
    models = {item["metadata"]["model"] for item in seen.items if item["type"] != "start"}
    assert models == {third}
    assert (await status(process.url, seen.stream_id))["model"] == third
    openai = await start(process.url, OPENAI, main)
    chunks = [item for item in openai.items if item != DONE]
    assert {chunk["model"] for chunk in chunks[1:]} == {third}
    assert (await start(process.url, NATIVE, main)).items[-1]["data"]["model"] == third


@pytest.mark.parametrize("fault", ["reset=3", "end_clean=1", "error_event=3", "bad_json=3"])
async def test_never_after_the_first_token(
    server: StartServer, upstream: UpstreamProcess, fault: str
) -> None:
    """An answer that broke off has failed: no other try and no other model, which would say
    something twice.
    """
    main, other = named(fault), named("tokens=5")
    process = server(
        model={"name": "up:", "base_url": upstream.base},
        upstreams=[row("a", upstream.base, [main, other], fallbacks=[other])],
        generation=QUICK,
    )
    seen = await start(process.url, CHAT, main)
    assert seen.ending == "failed"
    assert seen.text
    assert tries(upstream, main, other) == [1, 0]


REFUSED = {  # what the first model gets -> how often it is asked, and whether the fallback answers
    "status=400": (1, False),  # asked wrongly: no other model mends that
    "status=413": (1, False),
    "status=422": (1, False),
    "status=401": (1, True),
    "status=404": (1, True),
    "status=429": (3, True),
    "status=429,retry_after=40": (1, True),
    "status=503": (3, True),
    "first_error": (3, True),
    "end_clean=0": (3, True),
    "bad_json=0": (3, True),
    "headers_delay=60": (3, True),
}


async def test_what_is_tried_again(server: StartServer, upstream: UpstreamProcess) -> None:
    """A request that was refused as wrong goes nowhere else; where another try cannot help, the
    fallback is asked at once; else after the retries.
    """
    names = {fault: named(fault) for fault in REFUSED}
    others = {fault: named("tokens=5") for fault in REFUSED}
    process = server(
        model={"name": "up:", "base_url": upstream.base},
        upstreams=[
            row(f"a{n}", upstream.base, [names[fault], others[fault]], fallbacks=[others[fault]])
            for n, fault in enumerate(REFUSED)
        ],
        generation={**QUICK, "first_token_timeout": 1.0},
    )
    for fault, (asked, helped) in REFUSED.items():
        seen = await start(process.url, CHAT, names[fault])
        assert seen.ending == ("finished" if helped else "failed"), fault
        assert tries(upstream, names[fault], others[fault]) == [asked, int(helped)], fault


async def test_all_fail(server: StartServer, upstream: UpstreamProcess) -> None:
    """The error is the last one's."""
    main, second, third = map(named, ("status=500", "bad_json=0", "status=404"))
    process = server(
        model={"name": "up:", "base_url": upstream.base},
        upstreams=[row("a", upstream.base, [main, second, third], fallbacks=[second, third])],
        generation=QUICK,
    )
    seen = await start(process.url, OPENAI, main)
    assert (seen.status, seen.code) == (404, "upstream_rejected")
    assert tries(upstream, main, second, third) == [3, 3, 1]


async def test_a_fallback_elsewhere(server: StartServer, upstream: UpstreamProcess) -> None:
    """A fallback may be the default, and a host that is away is one that fails."""
    default = named("tokens=5")
    process = server(
        model={"name": default, "base_url": upstream.base},
        upstreams=[row("away", f"http://127.0.0.1:{closed_port()}/v1", ["m"], fallbacks=[default])],
        generation=QUICK,
    )
    check_whole(await start(process.url, CHAT, "m"), default)


async def test_fallbacks_are_of_the_first(server: StartServer, upstream: UpstreamProcess) -> None:
    """The fallbacks of a fallback do not count: the list is what it says, and no circle turns."""
    one, two, three = (named("status=500") for _ in range(3))
    process = server(
        model={"name": "up:", "base_url": upstream.base},
        upstreams=[
            row("a", upstream.base, [one], fallbacks=[two]),
            row("b", upstream.base, [two], fallbacks=[one, three]),
            row("c", upstream.base, [three]),
        ],
        generation=QUICK,
    )
    assert (await start(process.url, CHAT, one)).code == "upstream_failed"
    assert tries(upstream, one, two, three) == [3, 3, 0]


async def test_the_demo_beside_another_default(
    server: StartServer, upstream: UpstreamProcess
) -> None:
    """Where it is listed, `demo...` names reach the embedded model, with its knobs, and it may be a
    fallback; where it is not, they go to the default like every other name.
    """
    broken = named("status=500")
    default = {"name": "up:", "base_url": upstream.base}
    process = server(
        model=default,
        upstreams=[
            {"name": "embedded", "base_url": "", "models": ["demo"]},
            row("a", upstream.base, [broken], fallbacks=["demo:tokens=4"]),
        ],
        generation=QUICK,
    )
    before = len(upstream.log("demo"))
    demo = await start(process.url, CHAT, "demo:tokens=4,rate=1000")
    assert (demo.ending, demo.items[1]["metadata"]["model"]) == (
        "finished",
        "demo:tokens=4,rate=1000",
    )
    assert (await start(process.url, CONTENT, "demo")).ending == "finished"
    fallen = await start(process.url, CHAT, broken)
    assert (fallen.ending, fallen.items[1]["metadata"]["model"]) == ("finished", "demo:tokens=4")
    assert fallen.text
    assert len(upstream.log("demo")) == before
    assert await listed(process.url) == ["up:", "demo", broken]

    process = server(model=default)
    check_whole(await start(process.url, CONTENT, "demo"), "demo")
    check_whole(await start(process.url, CONTENT, "demo:fail=midway"), "demo:fail=midway")
    assert len(upstream.log("demo")) == before + 1
