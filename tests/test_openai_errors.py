"""What the stock `openai` package for Python raises, before an answer and midway.

A cut answer is never taken for a whole one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.behaviour import answer, expected
from tests.processes import Server, UpstreamProcess
from tests.sdk import ASKED, PROMPT, Client, client_of, read_into, reasons, said, stream, whole
from tests.sockets import closed_port


@pytest.fixture
async def client(relay_server: Server) -> AsyncIterator[Client]:
    """The SDK, before a server whose model is the upstream with every fault."""
    async with client_of(relay_server) as each:
        yield each


@pytest.fixture
async def demo(demo_server: Server) -> AsyncIterator[Client]:
    """The SDK, before a server as it comes."""
    async with client_of(demo_server) as each:
        yield each


# --- errors before the answer -------------------------------------------------------------------

REFUSALS = [
    (400, openai.BadRequestError),
    (401, openai.AuthenticationError),
    (403, openai.PermissionDeniedError),
    (404, openai.NotFoundError),
    (422, openai.UnprocessableEntityError),
    (429, openai.RateLimitError),
    (500, openai.InternalServerError),
    (503, openai.InternalServerError),
]


@pytest.mark.parametrize("ask", [stream, whole])
@pytest.mark.parametrize(("status", "raises"), REFUSALS)
async def test_a_refusal_raises_its_own_class(
    client: Client, ask: Any, status: int, raises: type[openai.APIStatusError]
) -> None:
    """What the upstream refuses before the answer, streamed or whole, the SDK raises as it would
    before the upstream itself; a failure of the upstream is a 502.
    """
    with pytest.raises(raises) as caught:
        await ask(client, f"up:status={status},retry_after=60")
    assert type(caught.value) is raises
    assert caught.value.status_code == (502 if status >= 500 else status)
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} <= set(caught.value.body)
    assert "sk-" not in str(caught.value)


async def test_the_demo_model_fails_before(server: Callable[..., Server]) -> None:
    """`demo:fail=` before the first token is a status and its exception, streamed and whole."""
    cases: list[tuple[str, type[openai.APIStatusError], int]] = [
        ("400", openai.BadRequestError, 400),
        ("401", openai.AuthenticationError, 401),
        ("429", openai.RateLimitError, 429),
        ("before", openai.InternalServerError, 502),
    ]
    async with client_of(server(generation={"retries": 0})) as client:
        for ask in (stream, whole):
            for fail, raises, status in cases:
                with pytest.raises(raises) as caught:
                    await ask(client, f"demo:fail={fail}")
                assert caught.value.status_code == status


@pytest.mark.parametrize("ask", [stream, whole])
async def test_a_rate_limit_says_when_to_come_back(client: Client, ask: Any) -> None:
    """The upstream's `Retry-After` reaches the client; a long one is not waited for here."""
    started = time.monotonic()
    with pytest.raises(openai.RateLimitError) as caught:
        await ask(client, "up:status=429,retry_after=60")
    assert caught.value.response.headers["retry-after"] == "60"
    assert caught.value.code == "upstream_rate_limited"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("ask", [stream, whole])
async def test_an_upstream_that_is_not_there(server: Callable[..., Server], ask: Any) -> None:
    """Refused connections are a 502, after the retries."""
    model = {"name": "gone", "base_url": f"http://127.0.0.1:{closed_port()}/v1"}
    async with client_of(server(model=model, generation={"backoff": 0.01})) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(client, "gone")
    assert caught.value.status_code == 502
    assert caught.value.code == "upstream_unreachable"


async def test_what_a_retry_mends_is_not_seen(client: Client, upstream: UpstreamProcess) -> None:
    """A 500, then a 503, then an answer: the SDK, which itself retries nothing, gets the answer."""
    model = "up:id=mended,status=500,then,status=503,then,tokens=5"
    assert said(await stream(client, model)) == expected(model, PROMPT)
    assert len(upstream.log(model)) == 3


async def test_our_own_refusals(client: Client) -> None:
    """Bad input raises the SDK's class for its status and names the field."""
    create: Any = client.chat.completions.create
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await create(model="up:", messages=[])
    assert caught.value.param == "messages"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        await create(model="up:", messages=ASKED, n=0)
    assert caught.value.param == "n"
    with pytest.raises(openai.APIStatusError) as large:
        await create(model="up:", messages=[{"role": "user", "content": "x" * 200_001}])
    assert large.value.status_code == 413
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="up:", input="hello")


# --- errors midway ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error_event", "reset", "end_clean", "bad_json"])
async def test_a_cut_answer_is_never_a_whole_one(client: Client, fault: str) -> None:
    """After the first token a fault raises; what came before it is the exact beginning. Asked for
    in one piece, it is a 502.
    """
    got: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError):
        await read_into(got, client, f"up:tokens=20,{fault}")
    assert said(got) == "".join(answer(PROMPT, 20)[:10])
    assert not reasons(got)
    with pytest.raises(openai.InternalServerError) as caught:
        await whole(client, f"up:tokens=20,{fault}")
    assert caught.value.status_code == 502


async def test_silence_midway_raises(
    server: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """An upstream that says no more is given up after `idle_timeout`; one that never began, after
    `first_token_timeout`: a 504 where no token has come.
    """
    generation = {"idle_timeout": 0.3, "first_token_timeout": 0.5, "retries": 0}
    base = server(model={"name": "up:", "base_url": upstream.base}, generation=generation)
    async with client_of(base) as client:
        got: list[ChatCompletionChunk] = []
        with pytest.raises(openai.APIError) as midway:
            await read_into(got, client, "up:tokens=20,stall")
        assert midway.value.code == "idle_timeout"
        assert said(got) == "".join(answer(PROMPT, 20)[:10])
        for ask in (stream, whole):
            with pytest.raises(openai.InternalServerError) as before:
                await ask(client, "up:delay=60")
            assert before.value.status_code == 504
            assert before.value.code == "first_token_timeout"


@pytest.mark.parametrize("fail", ["midway", "cut"])
async def test_the_demo_model_fails_midway(demo: Client, fail: str) -> None:
    """The SDK raises after half of the answer."""
    got: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError):
        await read_into(got, demo, f"demo:fail={fail},tokens=20,rate=1000")
    assert len(said(got).split()) == 10
    assert not reasons(got)


async def test_a_late_failure_comes_in_the_stream(
    server: Callable[..., Server], upstream: UpstreamProcess
) -> None:
    """After `commit_after` the 200 is out, token or not; a failure then is an event that raises."""
    generation = {"commit_after": 0.1, "first_token_timeout": 0.6, "retries": 0}
    base = server(model={"name": "up:", "base_url": upstream.base}, generation=generation)
    async with client_of(base) as client:
        create: Any = client.chat.completions.create
        answers = await create(model="up:delay=60", messages=ASKED, stream=True)
        with pytest.raises(openai.APIError) as caught:
            async for _ in answers:
                pass
    assert type(caught.value) is openai.APIError
    assert caught.value.code == "first_token_timeout"


async def test_a_stopped_answer_raises(client: Client, relay_server: Server) -> None:
    """Whoever reads an answer that somebody stops is told so."""
    create: Any = client.chat.completions.create
    answers = await create(model="up:rate=50,tokens=5000", messages=ASKED, stream=True)
    stream_id = answers.response.headers["x-stream-id"]
    await anext(answers)
    stop = f"{relay_server.url}/api/v1/streams/{stream_id}/stop"
    assert (await client.post(stop, cast_to=object)) is not None
    with pytest.raises(openai.APIError) as caught:
        async for _ in answers:
            pass
    assert caught.value.code == "cancelled"
