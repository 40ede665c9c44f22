"""The tests' upstream does on the wire what its model names say, and remembers what it saw."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests import readers
from tests.behaviour import Behaviour
from tests.processes import UpstreamProcess, until
from tests.readers import PROMPT, Answer, ask, ask_model, connect, question
from tests.upstream import answer, expected

CHAT = "/v1/chat/completions"


async def events(response: Answer) -> list[Any]:
    """The data of the events, parsed where they are JSON."""
    datas = [message.data for message in await response.read(readers.Sse())]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def text(chunks: list[Any], choice: int = 0, field: str = "content") -> str:
    found = ""
    for chunk in chunks:
        for each in [] if chunk == "[DONE]" else chunk.get("choices", []):
            if each["index"] == choice:
                found += each["delta"].get(field) or ""
    return found


def reasons(chunks: list[Any]) -> list[str]:
    """The finish reasons that came."""
    choices = [c for chunk in chunks if chunk != "[DONE]" for c in chunk.get("choices", [])]
    return [c["finish_reason"] for c in choices if c["finish_reason"]]


# --- the upstream: what it says -----------------------------------------------------------------


async def test_the_text_is_known_beforehand(upstream: UpstreamProcess) -> None:
    """The same question gives the same tokens, each with its number."""
    async with ask_model(upstream.url, "up:tokens=7") as response:
        chunks = await events(response)
    assert text(chunks) == "".join(answer(PROMPT, 7)) == expected("up:tokens=7", PROMPT)
    assert [token.strip()[-1] for token in answer(PROMPT, 7)] == list("0123456")
    assert answer(PROMPT, 7) != answer("another", 7)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert reasons(chunks) == ["stop"]
    assert chunks[-1] == "[DONE]"
    assert response.ended == "end"


async def test_a_plain_answer_is_one_object(upstream: UpstreamProcess) -> None:
    async with ask_model(upstream.url, "up:tokens=5", stream=False) as response:
        value = await response.json()
    assert value["object"] == "chat.completion"
    assert value["choices"][0]["message"]["content"] == expected("up:tokens=5", PROMPT)
    assert value["usage"]["completion_tokens"] == 5


async def test_usage_comes_where_asked_for(upstream: UpstreamProcess) -> None:
    """With `include_usage` a last chunk without choices, with `usage=0` not even then."""
    include: dict[str, Any] = {"stream_options": {"include_usage": True}}
    async with ask_model(upstream.url, "up:tokens=5", **include) as response:
        chunks = await events(response)
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["completion_tokens"] == 5
    for model, more in (("up:tokens=5,usage=0", include), ("up:tokens=5", {})):
        async with ask_model(upstream.url, model, **more) as response:
            assert not any("usage" in chunk for chunk in await events(response))


async def test_a_tool_call_comes_in_fragments(upstream: UpstreamProcess) -> None:
    async with ask_model(upstream.url, "up:tool=2") as response:
        chunks = await events(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    second = [call for call in calls if call["index"] == 1]
    assert second[0]["id"] == "call_0_1"
    assert second[0]["function"] == {"name": "get_weather", "arguments": ""}
    arguments = "".join(call["function"]["arguments"] for call in second)
    assert len(second) > 3
    assert json.loads(arguments)["city"] == "Oslo"
    assert reasons(chunks) == ["tool_calls"]
    async with ask_model(upstream.url, "up:tool", stream=False) as response:
        message = (await response.json())["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": arguments}


async def test_other_things_that_models_say(upstream: UpstreamProcess) -> None:
    """Reasoning, a refusal, logprobs, several choices, an answer cut short by `max_tokens`."""
    async with ask_model(upstream.url, "up:tokens=3,reasoning=2") as response:
        chunks = await events(response)
    assert text(chunks, field="reasoning_content") == "thought0 thought1 "
    assert text(chunks) == expected("up:tokens=3", PROMPT)
    async with ask_model(upstream.url, "up:tokens=3,refusal") as response:
        assert text(await events(response), field="refusal") == expected("up:tokens=3", PROMPT)
    async with ask_model(upstream.url, "up:tokens=3,logprobs") as response:
        first = (await events(response))[1]["choices"][0]
    assert first["logprobs"]["content"][0]["token"] == first["delta"]["content"]
    async with ask_model(upstream.url, "up:tokens=3", n=2) as response:
        chunks = await events(response)
    assert text(chunks, 1) == expected("up:tokens=3", PROMPT, choice=1) != text(chunks, 0)
    async with ask_model(upstream.url, "up:tokens=9", max_tokens=3) as response:
        chunks = await events(response)
    assert text(chunks) == "".join(answer(PROMPT, 3))
    assert reasons(chunks) == ["length"]
    async with ask_model(upstream.url, "up:echo=3,finish=content_filter") as response:
        chunks = await events(response)
    assert text(chunks) == PROMPT
    assert reasons(chunks) == ["content_filter"]


async def test_text_with_odd_line_ends(upstream: UpstreamProcess) -> None:
    """U+2028, U+0085 and an emoji go out as they are, not escaped."""
    model = "up:tokens=12,u2028"
    async with ask_model(upstream.url, model) as response:
        raw = await response.body()
    assert all(c.encode() in raw for c in ("\u2028", "\u0085", "\U0001f30a"))
    messages = readers.Sse().feed(raw)
    said = text([json.loads(message.data) for message in messages[:-1]])
    assert said == expected(model, PROMPT)


# --- the upstream: how it writes ----------------------------------------------------------------


async def test_each_byte_alone(upstream: UpstreamProcess) -> None:
    async with ask_model(upstream.url, "up:tokens=2,split") as response:
        pieces = [piece async for piece in response.pieces()]
    assert {len(piece) for piece in pieces} == {1}
    messages = readers.Sse().feed(b"".join(pieces))
    assert text([m.json() for m in messages[:-1]]) == expected("up:tokens=2", PROMPT)


async def test_several_events_a_write(upstream: UpstreamProcess) -> None:
    async with ask_model(upstream.url, "up:tokens=12,batch=4") as response:
        pieces = [piece.count(b"data: ") async for piece in response.pieces()]
    assert pieces == [5, 4, 4, 1, 1]  # the first with the role; then finish, then [DONE]


async def test_lines_of_other_kinds(upstream: UpstreamProcess) -> None:
    """CR LF, comments between the events, a very long line, a last line without an end."""
    async with ask_model(upstream.url, "up:tokens=3,crlf") as response:
        raw = await response.body()
    assert raw.count(b"\r\n\r\n") == 6
    assert raw.count(b"\n") == raw.count(b"\r\n")
    async with ask_model(upstream.url, "up:tokens=3,comments") as response:
        parser = readers.Sse()
        assert len(await response.read(parser)) == 6
    assert "keepalive" in parser.comments
    async with ask_model(upstream.url, "up:tokens=3,line=1000000") as response:
        assert text(await events(response)) == expected("up:tokens=3,line=1000000", PROMPT)
    async with ask_model(upstream.url, "up:tokens=3,no_blank") as response:
        assert (await response.body()).endswith(b"\n\ndata: [DONE]")
    async with ask_model(upstream.url, "up:tokens=3,no_blank,no_done") as response:
        assert b'"finish_reason": "stop"' in (await response.body()).split(b"\n\n")[-1]


async def test_an_answer_without_chunks(upstream: UpstreamProcess) -> None:
    async with connect(upstream.url) as connection:
        response = await connection.request("POST", CHAT, json_body=question("up:tokens=3,close"))
        assert response.headers["connection"] == "close"
        assert "transfer-encoding" not in response.headers
        assert text(await events(response)) == expected("up:tokens=3", PROMPT)
        assert response.ended == "end"


async def test_one_connection_serves_many_requests(upstream: UpstreamProcess) -> None:
    async with connect(upstream.url) as connection:
        for _ in range(3):
            response = await connection.request("POST", CHAT, json_body=question("up:tokens=3"))
            assert len(await events(response)) == 6
        response = await connection.request("GET", "/v1/models")
        assert [row["id"] for row in (await response.json())["data"]] == ["up-1", "up-2"]


@pytest.mark.parametrize(
    ("words", "first", "last"),
    [
        ("rate=40", 0.0, 0.475),
        ("delay=0.5", 0.5, 0.5),
        ("headers_delay=0.5", 0.5, 0.5),
        ("late_done=0.5", 0.0, 0.5),
        ("delay=0.5,role_first", 0.0, 0.5),
    ],
)
async def test_it_takes_its_time(
    upstream: UpstreamProcess, words: str, first: float, last: float
) -> None:
    """Where it says, and nowhere else. first, last: seconds before the first and the last event."""
    start = time.monotonic()
    async with ask_model(upstream.url, f"up:tokens=20,{words}") as response:
        times = [time.monotonic() - start async for _ in response.items(readers.Sse())]
    assert times[0] >= first
    assert times[-1] >= last
    assert times[-1] - times[0] == pytest.approx(last - first, abs=0.25)


async def test_comments_while_waiting(upstream: UpstreamProcess) -> None:
    """With `comments`, waiting is not silent: some upstreams say so that they are alive."""
    parser = readers.Sse()
    async with ask_model(upstream.url, "up:tokens=3,delay=0.5,comments") as response:
        items = response.items(parser)
        await anext(items)
    assert len(parser.comments) > 5


# --- the upstream: what goes wrong --------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
async def test_it_refuses(upstream: UpstreamProcess, status: int) -> None:
    async with ask_model(upstream.url, f"up:status={status},retry_after=2") as response:
        assert response.status == status
        assert response.headers["retry-after"] == "2"
        assert (await response.json())["error"]["code"] == f"code_{status}"


async def test_turns(upstream: UpstreamProcess) -> None:
    """Flaky: so many requests fail, then all is well. `then`: each request its own behaviour."""
    for model, wanted in (
        ("up:id=turns,flaky=2,status=503", [503, 503, 200, 200]),
        ("up:id=turns,status=500,then,status=429,then,tokens=1", [500, 429, 200, 200]),
    ):
        got = []
        for _ in wanted:
            async with ask_model(upstream.url, model) as response:
                got.append(response.status)
        assert got == wanted


async def test_a_word_that_is_none_is_refused(upstream: UpstreamProcess) -> None:
    async with ask_model(upstream.url, "up:tokns=3") as response:
        assert response.status == 400
        assert "tokns" in (await response.json())["error"]["message"]
    with pytest.raises(ValueError, match="stal"):
        Behaviour.of("up:stal")


@pytest.mark.parametrize(
    ("words", "ended"),
    [("reset", "cut"), ("reset=3", "cut"), ("end_clean", "end"), ("end_clean=0", "end")],
)
async def test_it_ends_midway(upstream: UpstreamProcess, words: str, ended: str) -> None:
    """By RST or as if all were well, after half of the tokens or so many; no finish reason."""
    tokens = int((words + "=5").split("=")[1])
    async with ask_model(upstream.url, f"up:tokens=10,{words}") as response:
        chunks = await events(response)
    assert response.ended == ended
    assert text(chunks) == "".join(answer(PROMPT, 10)[:tokens])
    assert "[DONE]" not in chunks
    assert reasons(chunks) == []


async def test_it_says_nonsense_midway(upstream: UpstreamProcess) -> None:
    """Half a JSON object, then it goes on; an error event, midway or first, then a clean end."""
    async with ask_model(upstream.url, "up:tokens=10,bad_json=2") as response:
        messages = await response.read(readers.Sse())
    with pytest.raises(ValueError, match=r"."):
        messages[3].json()
    assert messages[-1].data == "[DONE]"
    for words, before in (("error_event", 6), ("first_error", 0), ("error_event=0", 1)):
        async with ask_model(upstream.url, f"up:tokens=10,{words}") as response:
            chunks = await events(response)
        assert len(chunks) == before + 1
        assert chunks[-1]["error"]["message"] == "the model fell over"
        assert response.ended == "end"


async def test_no_done(upstream: UpstreamProcess) -> None:
    async with ask_model(upstream.url, "up:tokens=3,no_done") as response:
        chunks = await events(response)
    assert reasons(chunks) == ["stop"]
    assert "[DONE]" not in chunks
    assert response.ended == "end"


@pytest.mark.parametrize(
    ("kind", "ended"), [("reset", "cut"), ("end_clean", "cut"), ("bad_json", "end")]
)
async def test_a_plain_answer_goes_wrong(upstream: UpstreamProcess, kind: str, ended: str) -> None:
    async with ask_model(upstream.url, f"up:tokens=3,{kind}", stream=False) as response:
        raw = await response.body()
    assert response.ended == ended
    with pytest.raises(ValueError, match=r"."):
        json.loads(raw)


# --- the upstream: what it remembers ------------------------------------------------------------


@pytest.mark.parametrize("rst", [False, True])
@pytest.mark.parametrize(
    "words",
    ["stall", "stall=0", "stall_end", "headers_delay=60", "delay=60", "rate=10", "status=500"],
)
async def test_a_clients_going_is_seen_at_once(
    upstream: UpstreamProcess, words: str, rst: bool
) -> None:
    """Whatever it was doing then; told by a clock that this process shares. (It takes about 1 ms;
    the bound leaves room for a machine that does other things too.)"""
    model = f"up:id=going-{rst},tokens=50,{words}"
    async with connect(upstream.url) as connection:
        asking = asyncio.ensure_future(connection.request("POST", CHAT, json_body=question(model)))
        (entry,) = await upstream.requests(model)
        if words == "status=500":  # is over by itself
            assert (await asking).status == 500
            (entry,) = await upstream.requests(model, closed=True)
            assert entry["closed_by"] == "server"
            return
        if "delay" not in words:
            response = await asking
            await anext(response.pieces())
        assert entry["closed_at"] is None
        assert upstream.open() >= 1
        cut_at = time.monotonic()
        connection.cut(rst)
        asking.cancel()
        (entry,) = await upstream.requests(model, closed=True)
    assert entry["closed_by"] == "client"
    assert 0 <= entry["closed_at"] - cut_at < 0.5
    assert (await until(lambda: upstream.open() == 0)) is True


async def test_the_record(upstream: UpstreamProcess) -> None:
    """What was asked, with which key, when, how many tokens went out, and who ended it."""
    model = "up:id=record,tokens=10,reset=4"
    start = time.monotonic()
    async with ask(
        "POST",
        upstream.url + CHAT,
        json_body=question(model, extra=[1]),
        headers={"Authorization": "Bearer sk-1"},
    ) as response:
        await response.body()
    (entry,) = await upstream.requests(model, closed=True)
    assert entry["body"] == question(model, extra=[1])
    assert entry["authorization"] == "Bearer sk-1"
    assert entry["closed_by"] == "server"
    assert entry["tokens_sent"] == 4
    times = [entry[key] for key in ("opened_at", "first_token_at", "closed_at")]
    assert sorted(times) == times
    assert start < times[0] < times[-1] < time.monotonic()
