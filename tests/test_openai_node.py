"""The stock `openai` package for Node.js against `/v1`: what it gives, throws and cuts.

Against the embedded demo model, and against an upstream with every fault. The SDK's own retries are
off, so that one call is one request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.behaviour import TOOL, answer, expected
from tests.js import run_js
from tests.processes import Server, UpstreamProcess
from tests.sockets import closed_port

PROMPT = "what is a river?"
ASKED = [{"role": "user", "content": PROMPT}]


async def sdk(server: Server, *calls: tuple[str, str, dict[str, Any]]) -> list[Any]:
    """What the SDK makes of these calls: command, model, other fields. All run at once."""
    asked = [
        (command, {"messages": ASKED, "model": model, **more}) for command, model, more in calls
    ]
    results: list[Any] = await run_js("openai_sdk.mjs", "all", f"{server.url}/v1", asked)
    return results


async def test_an_answer_streamed_and_whole(relay_server: Server) -> None:
    """The exact text of a streamed and of a whole answer, with its finish reason."""
    model = "up:tokens=50,u2028"
    streamed, plain, helper = await sdk(
        relay_server, ("stream", model, {}), ("plain", model, {}), ("tools", model, {})
    )
    assert streamed["error"] is plain["error"] is helper["error"] is None
    assert streamed["text"] == expected(model, PROMPT)
    assert streamed["object"] == "chat.completion.chunk"
    assert streamed["role"] == "assistant"
    for each in (plain, helper):
        assert each["completion"]["object"] == "chat.completion"
        assert each["completion"]["choices"][0]["message"]["content"] == expected(model, PROMPT)
        assert each["completion"]["choices"][0]["finish_reason"] == "stop"
    assert plain["completion"]["usage"]["completion_tokens"] == 50


async def test_usage_comes_only_where_it_is_asked_for(relay_server: Server) -> None:
    """`include_usage` adds one chunk, which has it."""
    asked, unasked = await sdk(
        relay_server,
        ("stream", "up:tokens=9", {"stream_options": {"include_usage": True}}),
        ("stream", "up:tokens=9", {}),
    )
    assert asked["usage"]["completion_tokens"] == 9
    assert unasked["usage"] is None


async def test_everything_that_models_say(relay_server: Server) -> None:
    """Tool calls, reasoning, a refusal, several choices, log probabilities: streamed and whole."""
    two = {"n": 2}
    (
        tools,
        tools_whole,
        tools_helper,
        thought,
        thought_whole,
        refused,
        several,
        probable,
    ) = await sdk(
        relay_server,
        ("stream", "up:tool=2", {}),
        ("plain", "up:tool=2", {}),
        ("tools", "up:tool=2", {}),
        ("stream", "up:tokens=3,reasoning=2", {}),
        ("plain", "up:tokens=3,reasoning=2", {}),
        ("stream", "up:tokens=3,refusal", {}),
        ("stream", "up:tokens=20", two),
        ("stream", "up:tokens=20,logprobs", {"logprobs": True}),
    )
    name, arguments = TOOL
    wanted = [{"id": f"call_0_{i}", "name": name, "arguments": arguments} for i in (0, 1)]
    assert tools["tool_calls"] == wanted
    assert tools["finish_reason"] == "tool_calls"
    for each in (tools_whole, tools_helper):
        calls = each["completion"]["choices"][0]["message"]["tool_calls"]
        assert [{"id": call["id"], **call["function"]} for call in calls] == wanted
    assert thought["choices"][0]["reasoning"] == "thought0 thought1 "
    message = thought_whole["completion"]["choices"][0]["message"]
    assert message["reasoning_content"] == "thought0 thought1 "
    assert thought["text"] == message["content"] == expected("up:tokens=3", PROMPT)
    assert refused["choices"][0]["refusal"] == expected("up:tokens=3", PROMPT)
    assert refused["text"] == ""
    for index, choice in enumerate(several["choices"]):
        assert choice["text"] == expected("up:tokens=20", PROMPT, index)
        assert choice["finish_reason"] == "stop"
    assert probable["choices"][0]["tokens"] == answer(PROMPT, 20)


async def test_the_demo_model(demo_server: Server) -> None:
    """Out of the box: an answer, a tool call, reasoning, the list of models, one of them."""
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    streamed, plain, called, thought, listed, one, none = await sdk(
        demo_server,
        ("stream", "demo:rate=1000", {}),
        ("plain", "demo:rate=1000", {}),
        ("tools", "demo:tool=1,rate=1000", {"tools": [tool]}),
        ("stream", "demo:reasoning=5,rate=1000,tokens=10", {}),
        ("models", "", {}),
        ("model", "demo", {}),
        ("model", "gpt-none", {}),
    )
    assert streamed["text"] == plain["completion"]["choices"][0]["message"]["content"]
    assert streamed["finish_reason"] == "stop"
    (call,) = called["completion"]["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"]) == {"city": PROMPT}
    assert len(thought["choices"][0]["reasoning"].split()) == 5
    assert len(thought["text"].split()) == 10
    assert listed["models"] == ["demo"]
    assert one["model"]["id"] == "demo"
    assert none["error"]["class"] == "NotFoundError"


async def test_a_request_reaches_the_upstream_untouched(
    relay_server: Server, upstream: UpstreamProcess
) -> None:
    """Fields that the SDK and the server know nothing of included."""
    more = {"temperature": 0.25, "top_k": 40, "nested": {"a": [1, None, "é"]}, "nothing": None}
    model = "up:id=node-untouched"
    await sdk(relay_server, ("plain", model, more))
    (entry,) = await upstream.requests(model)
    body = {key: entry["body"][key] for key in ("messages", "model", *more)}
    assert body == {"messages": ASKED, "model": model, **more}


async def test_errors_before_the_answer(relay_server: Server) -> None:
    """Each status throws the SDK's class for it, streamed and whole; a failure of the upstream is a
    502, and a rate limit says when to come back.
    """
    cases = [
        (400, "BadRequestError"),
        (401, "AuthenticationError"),
        (403, "PermissionDeniedError"),
        (404, "NotFoundError"),
        (422, "UnprocessableEntityError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
    ]
    calls: list[tuple[str, str, dict[str, Any]]] = [
        (command, f"up:status={status},retry_after=60", {})
        for status, _ in cases
        for command in ("stream", "plain")
    ]
    results = await sdk(relay_server, *calls)
    for (status, name), pair in zip(
        cases, zip(results[::2], results[1::2], strict=True), strict=True
    ):
        for result in pair:
            assert result["error"]["class"] == name
            assert result["error"]["status"] == (502 if status >= 500 else status)
            assert "text" not in result
            assert "completion" not in result
            if status == 429:
                assert result["error"]["retry_after"] == "60"


async def test_an_upstream_that_is_not_there(server: Callable[..., Server]) -> None:
    """A 502 after the retries."""
    model = {"name": "gone", "base_url": f"http://127.0.0.1:{closed_port()}/v1"}
    relay = server(model=model, generation={"backoff": 0.01})
    for result in await sdk(relay, ("stream", "gone", {}), ("plain", "gone", {})):
        assert result["error"]["class"] == "InternalServerError"
        assert result["error"]["status"] == 502
        assert result["error"]["code"] == "upstream_unreachable"


@pytest.mark.parametrize("fault", ["error_event", "reset", "end_clean", "bad_json"])
async def test_a_cut_answer_is_never_a_whole_one(relay_server: Server, fault: str) -> None:
    """It throws; what came before is the exact beginning. In one piece it is a 502."""
    model = f"up:tokens=20,{fault}"
    streamed, plain, helper = await sdk(
        relay_server, ("stream", model, {}), ("plain", model, {}), ("tools", model, {})
    )
    assert streamed["text"] == "".join(answer(PROMPT, 20)[:10])
    assert streamed["finish_reason"] is None
    assert streamed["error"] is not None
    assert helper["error"] is not None
    assert plain["error"]["status"] == 502


async def test_the_demo_model_fails(demo_server: Server) -> None:
    """Refused before the first token, and midway by an error event and by a cut."""
    refused, midway, cut = await sdk(
        demo_server,
        ("stream", "demo:fail=401", {}),
        ("stream", "demo:fail=midway,tokens=20,rate=1000", {}),
        ("stream", "demo:fail=cut,tokens=20,rate=1000", {}),
    )
    assert refused["error"]["class"] == "AuthenticationError"
    for result in (midway, cut):
        assert len(result["text"].split()) == 10
        assert result["finish_reason"] is None
        assert "APIError" in result["error"]["classes"]


async def test_leaving_a_stream_closes_the_upstream(
    relay_server: Server, upstream: UpstreamProcess
) -> None:
    """An abort ends the model call, though the SDK itself takes it for a normal end."""
    model = "up:id=node-leaves,rate=20,tokens=5000"
    (result,), (entry,) = await asyncio.gather(
        sdk(relay_server, ("leave", model, {})), upstream.requests(model, closed=True)
    )
    assert result["error"] is None
    assert entry["closed_by"] == "client"
    assert entry["tokens_sent"] < 500
