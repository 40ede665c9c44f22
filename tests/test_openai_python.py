"""The stock `openai` package for Python against `/v1`: its answers, and its going.

Against the embedded demo model, and against an upstream with every fault.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest

from tests.behaviour import TOOL, answer, expected
from tests.processes import Server, UpstreamProcess, until
from tests.sdk import ASKED, PROMPT, Client, client_of, reasons, said, stream, whole

SOON = 1.0  # seconds in which a client's going reaches the upstream: far below any linger


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


# --- answers ------------------------------------------------------------------------------------


async def test_a_streamed_answer(client: Client) -> None:
    """The exact text in chunks of one id: the role first, the finish reason last, no usage."""
    chunks = await stream(client, "up:tokens=50,u2028")
    assert said(chunks) == expected("up:tokens=50,u2028", PROMPT)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.model for chunk in chunks} == {"up:tokens=50,u2028"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert reasons(chunks) == [(0, "stop")]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert not any(chunk.usage for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


async def test_an_answer_in_one_piece(client: Client) -> None:
    """One `chat.completion` with the exact text and the upstream's own count of tokens."""
    completion = await whole(client, "up:tokens=50,u2028")
    assert completion.object == "chat.completion"
    assert completion.model == "up:tokens=50,u2028"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == expected("up:tokens=50,u2028", PROMPT)
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.completion_tokens == 50


async def test_the_demo_model_answers_both_ways(demo: Client) -> None:
    """Streamed and in one piece, the embedded model's text is the same, and not empty."""
    model = "demo:rate=1000"
    chunks, completion = await asyncio.gather(stream(demo, model), whole(demo, model))
    assert said(chunks) == completion.choices[0].message.content
    assert PROMPT in said(chunks)
    assert reasons(chunks) == [(0, "stop")]


def test_the_synchronous_client(relay_server: Server) -> None:
    """The SDK without asyncio sees the same."""
    base = f"{relay_server.url}/v1"
    with openai.OpenAI(base_url=base, api_key="sk-client", max_retries=0) as client:
        answers = client.chat.completions.create(model="up:", messages=ASKED, stream=True)
        assert said(list(answers)) == expected("up:", PROMPT)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="up:status=400", messages=ASKED)


async def test_usage_comes_only_where_it_is_asked_for(client: Client) -> None:
    """With `include_usage` a last chunk without choices, and only that one, has the usage; without
    it there is no such chunk, though the upstream is asked for it every time.
    """
    chunks = await stream(client, "up:tokens=9", stream_options={"include_usage": True})
    assert [bool(chunk.usage) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9
    for options in ({}, {"stream_options": {"include_usage": False}}):
        chunks = await stream(client, "up:tokens=9", **options)
        assert not any(chunk.usage for chunk in chunks)
        assert all(chunk.choices for chunk in chunks)


async def test_usage_is_estimated_where_the_upstream_does_not_count(client: Client) -> None:
    """The estimate says that it is one."""
    chunks = await stream(client, "up:usage=0", stream_options={"include_usage": True})
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].usage.model_extra == {"estimated": True}


async def test_tool_calls(client: Client) -> None:
    """Two calls, streamed in fragments and whole: the SDK puts the same calls together."""
    async with client.chat.completions.stream(model="up:tool=2", messages=ASKED) as answers:
        streamed = await answers.get_final_completion()
    completion = await whole(client, "up:tool=2")
    for each in (streamed, completion):
        assert each.choices[0].finish_reason == "tool_calls"
        calls = each.choices[0].message.tool_calls
        assert calls is not None
        assert [call.id for call in calls] == ["call_0_0", "call_0_1"]
        assert [(call.function.name, call.function.arguments) for call in calls] == [TOOL, TOOL]
    assert completion.choices[0].message.content is None


async def test_the_demo_model_calls_a_tool_of_the_request(demo: Client) -> None:
    """`demo:tool=1` calls the first tool with JSON arguments, streamed and whole alike."""
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    chunks = await stream(demo, "demo:tool=1,rate=1000", tools=[tool])
    completion = await whole(demo, "demo:tool=1,rate=1000", tools=[tool])
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments) == {"name": PROMPT}
    deltas = [c.delta for chunk in chunks for c in chunk.choices]
    fragments = [part for delta in deltas for part in delta.tool_calls or ()]
    assert fragments[0].id == call.id
    arguments = [part.function.arguments or "" for part in fragments if part.function]
    assert "".join(arguments) == call.function.arguments
    assert reasons(chunks) == [(0, "tool_calls")]


async def test_reasoning_passes(client: Client, demo: Client) -> None:
    """`reasoning_content` comes beside the content and never inside it."""
    chunks = await stream(client, "up:tokens=5,reasoning=3")
    assert said(chunks, "reasoning_content") == "thought0 thought1 thought2 "
    assert said(chunks) == expected("up:tokens=5", PROMPT)
    message = (await whole(client, "up:tokens=5,reasoning=3")).choices[0].message
    assert message.reasoning_content == "thought0 thought1 thought2 "
    assert message.content == expected("up:tokens=5", PROMPT)
    chunks = await stream(demo, "demo:reasoning=5,rate=1000,tokens=10")
    assert len(said(chunks, "reasoning_content").split()) == 5
    assert len(said(chunks).split()) == 10


async def test_a_refusal_passes(client: Client) -> None:
    """Streamed and whole it is in `refusal`, and the content stays empty."""
    chunks = await stream(client, "up:tokens=5,refusal")
    message = (await whole(client, "up:tokens=5,refusal")).choices[0].message
    assert said(chunks, "refusal") == message.refusal == expected("up:tokens=5", PROMPT)
    assert not said(chunks)
    assert message.content is None


async def test_several_choices(client: Client) -> None:
    """With `n=2` each choice has its own text and its own finish reason, streamed and whole."""
    model = "up:tokens=20"
    chunks, completion = await stream(client, model, n=2), await whole(client, model, n=2)
    for choice in (0, 1):
        text = expected(model, PROMPT, choice)
        assert said(chunks, choice=choice) == text
        assert completion.choices[choice].index == choice
        assert completion.choices[choice].message.content == text
        assert completion.choices[choice].finish_reason == "stop"
    assert sorted(reasons(chunks)) == [(0, "stop"), (1, "stop")]


async def test_one_choice_of_several(demo: Client) -> None:
    """A model that gives one answer, whatever `n` says, has given a whole one."""
    model = "demo:rate=0,tokens=20,tool=1"
    completion, chunks = await whole(demo, model, n=3), await stream(demo, model, n=3)
    (choice,) = completion.choices
    assert choice.message.content == said(chunks)
    assert [choice.finish_reason] == [reason for _, reason in reasons(chunks)] == ["tool_calls"]


async def test_log_probabilities(client: Client) -> None:
    """Each token's comes once and in order, beside the text that it belongs to."""
    chunks = await stream(client, "up:tokens=20,logprobs", logprobs=True)
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.logprobs:
                tokens = [entry.token for entry in choice.logprobs.content or ()]
                assert "".join(tokens) == choice.delta.content
    choices = [c for chunk in chunks for c in chunk.choices if c.logprobs]
    entries = [entry for c in choices if c.logprobs for entry in c.logprobs.content or ()]
    assert [entry.token for entry in entries] == answer(PROMPT, 20)
    assert {entry.logprob for entry in entries} == {-0.5}
    (choice,) = (await whole(client, "up:tokens=20,logprobs", logprobs=True)).choices
    assert [entry.token for entry in choice.logprobs.content] == answer(PROMPT, 20)


async def test_a_request_reaches_the_upstream_untouched(
    client: Client, upstream: UpstreamProcess
) -> None:
    """Known and unknown fields, streamed and whole, go as they came; only `stream` and
    `include_usage` are the server's own. So is the key: the client's is not passed on.
    """
    known = {"temperature": 0.25, "seed": 7, "max_tokens": 3, "user": "ann", "stop": ["\u2028"]}
    unknown = {"top_k": 40, "nested": {"a": [1, None, "é"]}, "off": False, "nothing": None}
    for streamed in (True, False):
        model = f"up:id=untouched-{streamed}"
        ask = stream if streamed else whole
        await ask(client, model, **known, extra_body=unknown)
        (entry,) = await upstream.requests(model)
        body = entry["body"]
        assert body.pop("stream") is True
        assert body.pop("stream_options") == {"include_usage": True}
        assert body == {"model": model, "messages": ASKED, **known, **unknown}
        assert entry["authorization"] == "Bearer sk-test"


async def test_an_answer_cut_short_by_max_tokens(client: Client, demo: Client) -> None:
    """`length` is a finish reason, not an error."""
    chunks = await stream(client, "up:tokens=9", max_tokens=3)
    assert said(chunks) == "".join(answer(PROMPT, 3))
    assert reasons(chunks) == [(0, "length")]
    completion = await whole(demo, "demo:rate=1000", max_tokens=4)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 4


async def test_models(server: Callable[..., Server], upstream: UpstreamProcess) -> None:
    """`models.list()` gives what is configured, the default first; `retrieve` knows the same names,
    with slashes in them too.
    """
    table = {"name": "one", "base_url": upstream.base, "models": ["up:a", "org/model-1"]}
    async with client_of(server(upstreams=[table])) as client:
        names = [model.id async for model in client.models.list()]
        assert names == ["demo", "up:a", "org/model-1"]
        for name in names:
            model = await client.models.retrieve(name)
            assert (model.id, model.object) == (name, "model")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("gpt-none")
        assert caught.value.code == "model_not_found"


# --- a client that goes -------------------------------------------------------------------------


async def test_leaving_a_stream_closes_the_upstream(
    client: Client, upstream: UpstreamProcess
) -> None:
    """A client of this API cannot come back: its going ends the model call at once."""
    model = "up:id=py-leaves,rate=50,tokens=5000"
    create: Any = client.chat.completions.create
    async with await create(model=model, messages=ASKED, stream=True) as answers:
        await anext(answers)
    left = time.monotonic()
    (entry,) = await upstream.requests(model, closed=True)
    assert entry["closed_by"] == "client"
    assert entry["closed_at"] - left < SOON


@pytest.mark.parametrize("ask", [stream, whole])
async def test_leaving_before_the_first_token_closes_the_upstream(
    client: Client, upstream: UpstreamProcess, ask: Any
) -> None:
    """Also while nothing has come yet, streamed or whole."""
    model = f"up:id=py-leaves-early-{ask.__name__},delay=60"
    asking = asyncio.ensure_future(ask(client, model))
    await upstream.requests(model)
    assert not asking.done()
    asking.cancel()
    left = time.monotonic()
    (entry,) = await upstream.requests(model, closed=True)
    assert entry["closed_by"] == "client"
    assert entry["closed_at"] - left < SOON
    await until(asking.done)
