"""The dialect openai, wire.md section 2.5: its chunks, its errors, and whole answers."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from streaming.dialects import OPENAI, OPENAI_WITH_USAGE, completion, openai_error
from streaming.events import Event
from tests.samples import (
    ANSWER,
    CANCELLED,
    CHUNK_HEAD,
    CODE,
    ERROR,
    EVERY,
    FAILED,
    FINISHED,
    HELLO,
    IMAGE,
    LOGPROB,
    PART_STARTED,
    REASONING,
    REFUSAL,
    SECOND,
    STARTED,
    STREAM,
    TABLE,
    TOOLS,
    USAGE,
    WITH_EXTRA,
    WITH_LOGPROBS,
    event,
    said,
    text,
)


def chunk(delta: dict[str, Any], finish: str | None = None, index: int = 0, **more: Any) -> Any:
    choice = {"index": index, "delta": delta, **more, "finish_reason": finish}
    return {**CHUNK_HEAD, "choices": [choice]}


def test_openai() -> None:
    """The role first, the content, the finish reason, the usage without choices, `[DONE]`."""
    assert said(OPENAI_WITH_USAGE, *ANSWER) == [
        {
            "id": f"chatcmpl-{STREAM}",
            "object": "chat.completion.chunk",
            "created": 1763719200,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "delta": {"role": "assistant", "content": ""},
                    "finish_reason": None,
                }
            ],
        },
        {
            "id": f"chatcmpl-{STREAM}",
            "object": "chat.completion.chunk",
            "created": 1763719200,
            "model": "m",
            "choices": [{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}],
        },
        {
            "id": f"chatcmpl-{STREAM}",
            "object": "chat.completion.chunk",
            "created": 1763719200,
            "model": "m",
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        },
        {
            "id": f"chatcmpl-{STREAM}",
            "object": "chat.completion.chunk",
            "created": 1763719200,
            "model": "m",
            "choices": [],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
        },
        "[DONE]",
    ]


def test_openai_says_usage_only_where_it_was_asked_for() -> None:
    """Without `include_usage` that one chunk is not there; all else is the same."""
    for each in EVERY:
        asked = said(OPENAI_WITH_USAGE, each)
        assert said(OPENAI, each) == [item for item in asked if "usage" not in item]


def test_openai_streams_a_tool_call() -> None:
    """Its name and id first, its arguments as they come; their whole is not repeated."""
    function = {"name": "get_weather", "arguments": ""}
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    fragment = {"index": 0, "function": {"arguments": '{"city":'}}
    assert said(OPENAI, *TOOLS) == [
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [fragment]}),
    ]


def test_openai_has_a_field_for_each_kind_of_delta() -> None:
    """Thoughts, refusals; labelled text is content like any other."""
    assert said(OPENAI, REASONING, REFUSAL, CODE, TABLE, IMAGE) == [
        chunk({"reasoning_content": "Hmm"}),
        chunk({"refusal": "No"}),
        chunk({"content": "print()\n"}),
        chunk({"content": TABLE.data["content"]}),
        chunk({"content": "![a](http://x/y.png)"}),
    ]


def test_openai_passes_on_what_it_does_not_know() -> None:
    """Unknown fields of a delta stay in it; log probabilities stand beside it."""
    logprobs = {"content": [LOGPROB], "refusal": None}
    assert said(OPENAI, WITH_LOGPROBS, WITH_EXTRA) == [
        chunk({"content": "Hi"}, logprobs=logprobs),
        chunk({"content": "Hi", "hue": 1}),
    ]


def test_openai_tells_several_answers_apart() -> None:
    """Each chunk has its choice's index, and each choice its finish reason."""
    finished = event(
        "finished",
        9,
        finish_reason="stop",
        finish_reasons={"0": "stop", "1": "length"},
        usage=USAGE,
    )
    started = event(
        "part_started", 4, part=2, kind="tool_call", index=1, id="i", name="n", choice=1
    )
    call = {
        "index": 1,
        "id": "i",
        "type": "function",
        "function": {"name": "n", "arguments": ""},
    }
    assert said(OPENAI, SECOND, started, finished) == [
        chunk({"content": "Hallo"}, index=1),
        chunk({"tool_calls": [call]}, index=1),
        chunk({}, "stop"),
        chunk({}, "length", index=1),
        "[DONE]",
    ]


def test_openai_says_an_error_and_no_done() -> None:
    """With OpenAI's fields around ours."""
    assert said(OPENAI, FAILED, CANCELLED) == [
        {
            "error": {
                "message": "the model's connection was cut",
                "type": "server_error",
                "param": None,
                "code": "upstream_cut",
                "request_id": "r1",
            }
        },
        {
            "error": {
                "message": "Stopped",
                "type": "server_error",
                "param": None,
                "code": "cancelled",
                "request_id": "",
            }
        },
    ]


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (0, "server_error"),
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (502, "server_error"),
    ],
)
def test_an_openai_error_has_the_type_of_its_status(status: int, type: str) -> None:
    """The field at fault and the request's id are kept."""
    error = {"code": "c", "message": "m", "param": "p", "request_id": "r"}
    assert openai_error(error, status) == {**error, "type": type}


def test_a_failure_midway_has_the_type_of_the_upstreams_status() -> None:
    """Where the upstream had one; our own status where it had none."""
    limited = event("failed", error=ERROR, status=502, upstream_status=429)
    refused = event("failed", error=ERROR, status=400)
    types = [said(OPENAI, each)[0]["error"]["type"] for each in (limited, refused)]  # type: ignore[index]
    assert types == ["rate_limit_error", "invalid_request_error"]


@pytest.mark.parametrize("each", EVERY, ids=lambda e: f"{e.type} {e.data.get('kind', '')}")
def test_an_openai_chunk_is_one_by_the_sdks_own_types(each: Event) -> None:
    """Every object that is no error, held against the stock SDK's model, strictly."""
    for item in said(OPENAI_WITH_USAGE, each):
        if isinstance(item, dict) and "error" not in item:
            ChatCompletionChunk.model_validate(item, strict=False)


# Whole answers


def whole(*choices: dict[str, Any]) -> dict[str, Any]:
    return {**CHUNK_HEAD, "object": "chat.completion", "choices": list(choices), "usage": USAGE}


def answer(finish: str = "stop", index: int = 0, logprobs: Any = None, **message: Any) -> Any:
    said = {"role": "assistant", "content": None, **message}
    return {"index": index, "message": said, "logprobs": logprobs, "finish_reason": finish}


def test_a_completion() -> None:
    """The finished events of a generation as one object."""
    assert completion(ANSWER) == {
        "id": f"chatcmpl-{STREAM}",
        "object": "chat.completion",
        "created": 1763719200,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }


def finish(reason: str, *others: str) -> Event:
    reasons = {str(index): each for index, each in enumerate((reason, *others))}
    more = {"finish_reasons": reasons} if others else {}
    return event("finished", 9, finish_reason=reason, usage=USAGE, model="m", **more)


COMPLETIONS: dict[str, tuple[list[Event], dict[str, Any]]] = {
    "joined text, labelled or not": (
        [HELLO, CODE, IMAGE, finish("stop")],
        whole(answer(content="Helloprint()\n![a](http://x/y.png)")),
    ),
    "tool calls, whole": (
        [PART_STARTED, *TOOLS, finish("tool_calls")],
        whole(
            answer(
                "tool_calls",
                tool_calls=[
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                    }
                ],
            )
        ),
    ),
    "thoughts beside the text": (
        [REASONING, HELLO, finish("stop")],
        whole(answer(content="Hello", reasoning_content="Hmm")),
    ),
    "a refusal": ([REFUSAL, finish("stop")], whole(answer(refusal="No"))),
    "joined log probabilities": (
        [WITH_LOGPROBS, WITH_LOGPROBS, finish("stop")],
        whole(answer(content="HiHi", logprobs={"content": [LOGPROB] * 2, "refusal": None})),
    ),
    "unknown fields": (
        [WITH_EXTRA, finish("stop")],
        whole(answer(content="Hi", hue=1)),
    ),
    "nothing at all": ([finish("stop")], whole(answer())),
    "several answers": (
        [SECOND, HELLO, finish("stop", "length")],
        whole(answer(content="Hello"), answer("length", 1, content="Hallo")),
    ),
    "several answers, one of them empty": (
        [HELLO, finish("stop", "content_filter")],
        whole(answer(content="Hello"), answer("content_filter", 1)),
    ),
}


@pytest.mark.parametrize(("events", "expected"), COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_what_a_completion_holds(events: list[Event], expected: dict[str, Any]) -> None:
    """By the stock SDK's own types, too; and it is the same a second time."""
    ChatCompletion.model_validate(completion([STARTED, *events]))
    assert completion([STARTED, *events]) == expected


def test_log_probabilities_of_any_shape_are_kept() -> None:
    """Upstreams have shapes of their own: lists are joined, of anything else the first stays."""
    shapes: list[Any] = [{"a": None, "b": "x"}, {"a": [1], "b": None}, {"a": [2], "c": {"d": 1}}]
    events = [text("Hi", extra={"logprobs": shape}) for shape in shapes]
    (choice,) = completion([STARTED, *events, FINISHED])["choices"]
    assert choice["logprobs"] == {"a": [1, 2], "b": "x", "c": {"d": 1}}
