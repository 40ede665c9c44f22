"""Dialects, word for word as wire.md section 2 has them. What each says is written out in full."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from streaming.dialects import (
    CHAT,
    CONTENT,
    CONTENT_WITHOUT_DONE,
    DIALECTS,
    DONE,
    NATIVE,
    OPENAI,
    OPENAI_WITH_USAGE,
    TOOL,
    Dialect,
    is_text,
    timestamp,
)
from streaming.events import Event
from tests.samples import (
    ANSWER,
    CANCELLED,
    CODE,
    ERROR,
    EVERY,
    FAILED,
    FINISHED,
    HELLO,
    IMAGE,
    PART_FINISHED,
    PART_STARTED,
    REASONING,
    REFUSAL,
    SECOND,
    STAMP,
    STARTED,
    STREAM,
    TABLE,
    TIME,
    TOOLS,
    USAGE,
    WITH_EXTRA,
    WITH_LOGPROBS,
    said,
)

ALL = [*DIALECTS.values(), CONTENT_WITHOUT_DONE, OPENAI]

# 2.1


def test_content_says_the_text() -> None:
    """One object a delta, then `[DONE]`."""
    assert said(CONTENT, *ANSWER) == [{"content": "Hello"}, "[DONE]"]


def test_content_says_why_it_ends_early() -> None:
    """A failure with message and code, a stop as `cancelled`; neither is followed by `[DONE]`."""
    assert said(CONTENT, STARTED, HELLO, FAILED) == [
        {"content": "Hello"},
        {"error": "the model's connection was cut", "code": "upstream_cut"},
    ]
    assert said(CONTENT, CANCELLED) == [{"error": "Stopped", "code": "cancelled"}]


def test_content_takes_the_position_of_the_start() -> None:
    """Of `started` it says nothing, but its readers learn where they are; of all else they do not
    hear at all.
    """
    assert CONTENT.say(STARTED) == []
    unheard = [PART_STARTED, REASONING, REFUSAL, SECOND, *TOOLS, PART_FINISHED]
    assert [CONTENT.say(each) for each in unheard] == [None] * len(unheard)


# 2.2


def test_chat() -> None:
    """Start, chunks, end."""
    assert said(CHAT, *ANSWER) == [
        {
            "type": "start",
            "content": "",
            "conversation_id": "c1",
            "stream_id": STREAM,
            "timestamp": STAMP,
        },
        {
            "type": "chunk",
            "content": "Hello",
            "conversation_id": "c1",
            "timestamp": STAMP,
            "metadata": {"model": "m"},
        },
        {
            "type": "end",
            "content": "",
            "conversation_id": "c1",
            "timestamp": STAMP,
            "metadata": {"model": "m", "finish_reason": "stop", "usage": USAGE},
        },
    ]


def test_chat_names_its_fields_in_the_order_of_the_page() -> None:
    """Clients that print what they get show it as documented."""
    start, chunk, _ = said(CHAT, *ANSWER)
    assert list(start) == ["type", "content", "conversation_id", "stream_id", "timestamp"]
    assert list(chunk) == ["type", "content", "conversation_id", "timestamp", "metadata"]


def test_chat_ends_with_cancelled_or_error() -> None:
    """A stop is an end of its own kind, a failure is no end."""
    assert said(CHAT, CANCELLED, FAILED) == [
        {
            "type": "end",
            "content": "",
            "conversation_id": "c1",
            "timestamp": STAMP,
            "metadata": {"model": "m", "finish_reason": "cancelled", "usage": USAGE},
        },
        {
            "type": "error",
            "content": "the model's connection was cut",
            "conversation_id": "c1",
            "timestamp": STAMP,
            "metadata": {"code": "upstream_cut"},
        },
    ]


CONTENT_TYPES: dict[str, tuple[Event, dict[str, Any]]] = {
    "code": (CODE, {"contentType": "code", "data": {"language": "python"}}),
    "table": (
        TABLE,
        {"contentType": "table", "data": {"tableData": [["a", "b"], ["1", "x | y"]]}},
    ),
    "image": (IMAGE, {"contentType": "image", "data": {"imageUrl": "http://x/y.png"}}),
}


@pytest.mark.parametrize("kind", CONTENT_TYPES)
def test_a_chat_chunk_says_what_it_is(kind: str) -> None:
    """Code, table or image, with what clients need to show it; the text itself is not altered."""
    delta, fields = CONTENT_TYPES[kind]
    assert said(CHAT, delta) == [
        {
            "type": "chunk",
            "content": delta.data["content"],
            "conversation_id": "c1",
            "timestamp": STAMP,
            "metadata": {"model": "m"},
            **fields,
        }
    ]


# 2.3


def test_tool() -> None:
    """Content, the call once it is whole, the counts, `[DONE]`."""
    assert said(TOOL, STARTED, HELLO, *TOOLS, FINISHED) == [
        {"type": "content", "content": "Hello"},
        {"type": "tool_call", "tool": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
        {"type": "done", "usage": {"promptTokens": 3, "completionTokens": 5}},
        "[DONE]",
    ]


def test_tool_says_done_after_an_error_too() -> None:
    """The error is the one object that it is everywhere."""
    assert said(TOOL, FAILED) == [{"type": "error", "error": ERROR}, "[DONE]"]
    assert said(TOOL, CANCELLED) == [
        {"type": "error", "error": {"code": "cancelled", "message": "Stopped"}},
        "[DONE]",
    ]


# 2.6


def test_native() -> None:
    """The log's own words: type, time, data with the stream's id. (A framing adds the id.)"""
    assert said(NATIVE, *ANSWER) == [
        {"type": "started", "time": TIME, "data": {"stream_id": STREAM, "model": "m"}},
        {
            "type": "part_started",
            "time": TIME,
            "data": {"stream_id": STREAM, "part": 0, "kind": "text"},
        },
        {
            "type": "delta",
            "time": TIME,
            "data": {"stream_id": STREAM, "part": 0, "kind": "text", "content": "Hello"},
        },
        {
            "type": "part_finished",
            "time": TIME,
            "data": {"stream_id": STREAM, "part": 0, "kind": "text"},
        },
        {
            "type": "finished",
            "time": TIME,
            "data": {
                "stream_id": STREAM,
                "finish_reason": "stop",
                "usage": USAGE,
                "model": "m",
            },
        },
    ]


def test_native_says_everything() -> None:
    """No event of a log is kept from it."""
    assert [item["type"] for item in said(NATIVE, *EVERY)] == [each.type for each in EVERY]  # type: ignore[index]


# All of them


def test_the_table_names_each_dialect() -> None:
    """By the name that a client asks for; `openai` by name comes with usage."""
    assert list(DIALECTS) == ["content", "chat", "tool", "native", "openai"]
    assert all(DIALECTS[name].name == name for name in DIALECTS)
    assert DIALECTS["openai"] is OPENAI_WITH_USAGE
    assert CONTENT_WITHOUT_DONE.say is CONTENT.say


def test_the_habits_of_each_dialects_clients() -> None:
    """Where the ids stand in SSE, who waits for the first delta, who is cut after a failure."""
    ids = {d.name: d.ids for d in ALL}
    assert ids == {
        "content": "after",
        "chat": "before",
        "tool": "before",
        "native": "before",
        "openai": "none",
    }
    assert {d.name for d in ALL if d.holds} == {d.name for d in ALL if d.cuts} == {"openai"}
    assert {d.name for d in ALL if d.named} == {"native"}
    assert {d for d in ALL if not d.done} == {CONTENT_WITHOUT_DONE}


@pytest.mark.parametrize("dialect", ALL, ids=lambda d: d.name)
def test_a_dialect_is_a_pure_function(dialect: Dialect) -> None:
    """It says the same again, changes nothing in the event, and gives objects that are the
    caller's to add to.
    """
    for each in EVERY:
        before = copy.deepcopy(each)
        first = copy.deepcopy(dialect.say(each))
        for item in dialect.say(each) or ():
            if item is not DONE:
                item["id"] = "added"
        assert each == before
        assert dialect.say(each) == first
    assert DONE == {}


@pytest.mark.parametrize("dialect", [CONTENT, CHAT, TOOL], ids=lambda d: d.name)
def test_thoughts_are_only_for_dialects_that_have_a_word_for_them(dialect: Dialect) -> None:
    """Reasoning, refusals and second answers never pass for the answer."""
    assert said(dialect, REASONING, REFUSAL, SECOND) == []


def test_what_is_text_of_the_answer() -> None:
    """Deltas of text, however labelled, of the first answer."""
    assert [each for each in EVERY if is_text(each)] == [
        *(HELLO, CODE, TABLE, IMAGE, WITH_LOGPROBS, WITH_EXTRA)
    ]


def test_a_timestamp_has_milliseconds() -> None:
    """RFC 3339 in UTC, exact to the millisecond."""
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(TIME + 7) == "2025-11-21T10:00:00.007Z"
    assert timestamp(4102444799999) == "2099-12-31T23:59:59.999Z"
