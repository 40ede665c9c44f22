"""The writer: what a model says, as events of its answer's log."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import UpstreamError
from streaming.log import Log
from streaming.models import Piece
from streaming.writer import Writer, message_chars
from tests.properties import property_test

Said = tuple[str, dict[str, Any]]
TEXT = {"part": 0, "kind": "text"}
MARKDOWN = (
    "Look:\n```python\nprint('|')\n```\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    "![a cat](http://x/c.png) and `![no image](x)`\n~~~\nplain\n~~~\nbye ``"
)


def writer(choices: int = 1, max_bytes: int = 1 << 20) -> tuple[Writer, Log]:
    log = Log({})
    return Writer(log, choices, max_bytes), log


def events(log: Log, merge: bool = True) -> list[Said]:
    return [(event.type, dict(event.data)) for event in log.read(0, merge=merge)]


def written(*pieces: Piece) -> list[Said]:
    """The merged events of an answer of these pieces."""
    each, log = writer()
    each.write(pieces)
    each.close_parts()
    return events(log)


def started(part: int = 0, kind: str = "text", **data: Any) -> Said:
    return "part_started", {"part": part, "kind": kind, **data}


def said(content: str, part: int = 0, kind: str = "text", **data: Any) -> Said:
    return "delta", {"part": part, "kind": kind, **data, "content": content}


def finished(part: int = 0, kind: str = "text", **data: Any) -> Said:
    return "part_finished", {"part": part, "kind": kind, **data}


# Parts


def test_an_answer_is_a_part() -> None:
    """Opened by its first piece, closed at the end."""
    assert written(Piece("text", "Hello"), Piece("text", ", you")) == [
        started(),
        said("Hello, you"),
        finished(),
    ]


def test_another_kind_is_another_part() -> None:
    """Thoughts, then text, then thoughts again: three parts, each closed before the next opens."""
    pieces = [Piece("reasoning", "Hm"), Piece("text", "Hi"), Piece("reasoning", "Oh")]
    assert written(*pieces) == [
        *(started(0, "reasoning"), said("Hm", 0, "reasoning"), finished(0, "reasoning")),
        *(started(1), said("Hi", 1), finished(1)),
        *(started(2, "reasoning"), said("Oh", 2, "reasoning"), finished(2, "reasoning")),
    ]


def test_a_refusal_is_a_part_of_its_own() -> None:
    """It is no text of the answer."""
    assert written(Piece("refusal", "No")) == [
        *(started(0, "refusal"), said("No", 0, "refusal"), finished(0, "refusal"))
    ]


def test_a_delta_goes_into_the_log_when_it_comes() -> None:
    """Not when its part ends."""
    each, log = writer()
    each.write([Piece("text", "Hel")])
    assert events(log) == [started(), said("Hel")]
    each.write([Piece("text", "lo"), Piece("reasoning", "Hm")])
    assert events(log, merge=False)[2:] == [
        *(said("lo"), finished(), started(1, "reasoning"), said("Hm", 1, "reasoning"))
    ]


def test_closing_twice_closes_once() -> None:
    """And without a part there is nothing to close."""
    each, log = writer()
    each.close_parts()
    assert log.top == 0
    each.write([Piece("text", "Hi"), Piece("tool_call", "{}", id="i", name="n")])
    each.close_parts()
    top = log.top
    each.close_parts()
    assert log.top == top


def test_answers_that_were_asked_for_together_have_parts_of_their_own() -> None:
    """Each says which choice it is of, but the first's, which need not."""
    pieces = [
        *(Piece("text", "A"), Piece("text", "B", choice=1), Piece("text", "a")),
        *(Piece("text", "b", choice=1), Piece("tool_call", "{}", choice=1, id="i", name="n")),
    ]
    call = {"choice": 1, "index": 0, "id": "i", "name": "n"}
    assert written(*pieces) == [
        *(started(0), said("A"), started(1, choice=1), said("B", 1, choice=1)),
        *(said("a"), said("b", 1, choice=1), finished(1, choice=1)),
        *(started(2, "tool_call", **call), said("{}", 2, "tool_call", choice=1, index=0)),
        *(finished(0), finished(2, "tool_call", **call, arguments="{}")),
    ]


# Labels


def test_text_is_labelled_as_it_streams() -> None:
    """Code with its language, tables, images with their address: one part, whose deltas say what
    they are.
    """
    assert written(Piece("text", MARKDOWN)) == [
        started(),
        said("Look:\n"),
        said("```python\nprint('|')\n```\n", kind="code", language="python"),
        said("| a | b |\n|---|---|\n| 1 | 2 |\n", kind="table"),
        said("\n"),
        said("![a cat](http://x/c.png)", kind="image", image_url="http://x/c.png"),
        said(" and `![no image](x)`\n"),
        said("~~~\nplain\n~~~\n", kind="code", language=""),
        said("bye ``"),
        finished(),
    ]


def cut(text: str, at: Iterable[int]) -> list[Piece]:
    places = [0, *sorted(at), len(text)]
    parts = (text[a:b] for a, b in pairwise(places))
    return [Piece("text", part) for part in parts if part]


@property_test
@given(
    st.just(MARKDOWN) | st.text(alphabet="`~|![]() ab\n", max_size=60) | st.text(),
    st.lists(st.integers(0, len(MARKDOWN)), max_size=20),
)
def test_how_text_was_cut_changes_nothing(text: str, cuts: list[int]) -> None:
    """The merged events are the same whatever pieces it came in, and they are the text."""
    pieces = cut(text, [min(at, len(text)) for at in cuts])
    whole = written(*cut(text, []))
    assert written(*pieces) == whole
    assert "".join(data["content"] for type, data in whole if type == "delta") == text


def test_what_was_held_back_comes_before_what_follows() -> None:
    """Half a marker is text when its part ends, or when a delta stands alone."""
    extra: dict[str, Any] = {"logprobs": {"content": []}}
    assert written(Piece("text", "a ![b"), Piece("reasoning", "Hm"))[:3] == [
        *(started(), said("a ![b"), finished())
    ]
    assert written(Piece("text", "a ![b"), Piece("text", "c", extra=extra)) == [
        *(started(), said("a ![b"), said("c", extra=extra), finished())
    ]


def test_a_delta_with_fields_of_its_own_stands_alone() -> None:
    """Log probabilities belong to this very delta: it is merged with none."""
    first, second = ({"logprobs": {"content": [{"token": each}]}} for each in "ab")
    pieces = [Piece("text", "a", extra=first), Piece("text", "b", extra=second), Piece("text", "c")]
    assert written(*pieces) == [
        *(started(), said("a", extra=first), said("b", extra=second), said("c"), finished())
    ]


# Tool calls


def test_a_tool_call_ends_with_its_whole_arguments() -> None:
    """Name and id come first, fragments as they come; the whole stands in its end."""
    call = {"index": 0, "id": "call_1", "name": "get_weather"}
    assert written(
        Piece("tool_call", "", id="call_1", name="get_weather"),
        Piece("tool_call", '{"city"'),
        Piece("tool_call", ': "Oslo"}'),
    ) == [
        started(0, "tool_call", **call),
        said('{"city": "Oslo"}', 0, "tool_call", index=0),
        finished(0, "tool_call", **call, arguments='{"city": "Oslo"}'),
    ]


def test_calls_may_be_told_by_turns() -> None:
    """Fragments go to the call of their place; all calls end at the end, in their order."""
    first = {"index": 0, "id": "a", "name": "f"}
    second = {"index": 1, "id": "b", "name": "g"}
    assert written(
        Piece("text", "Let me see."),
        *(Piece("tool_call", "{", 0, 0, "a", "f"), Piece("tool_call", "[", 0, 1, "b", "g")),
        *(Piece("tool_call", "}", 0, 0), Piece("tool_call", "]", 0, 1)),
    ) == [
        *(started(), said("Let me see."), finished()),
        *(started(1, "tool_call", **first), said("{", 1, "tool_call", index=0)),
        *(started(2, "tool_call", **second), said("[", 2, "tool_call", index=1)),
        *(said("}", 1, "tool_call", index=0), said("]", 2, "tool_call", index=1)),
        finished(1, "tool_call", **first, arguments="{}"),
        finished(2, "tool_call", **second, arguments="[]"),
    ]


def test_text_after_a_call_is_a_new_part() -> None:
    """The call stays open until the end: more of it may come."""
    kinds = [
        (type, data["part"])
        for type, data in written(
            Piece("text", "a"), Piece("tool_call", "{", id="i", name="n"), Piece("text", "b")
        )
    ]
    assert kinds == [
        *(("part_started", 0), ("delta", 0), ("part_finished", 0)),
        *(("part_started", 1), ("delta", 1), ("part_started", 2), ("delta", 2)),
        *(("part_finished", 2), ("part_finished", 1)),
    ]


# What is said besides


def test_spoken_is_set_by_the_answer_only() -> None:
    """Not by a finish reason or usage, after which another attempt would repeat nothing."""
    each, log = writer()
    each.write([Piece("finish", "stop"), Piece("usage", extra={"total_tokens": 1})])
    assert not each.spoken and log.top == 0
    for piece in (Piece("text", "a"), Piece("reasoning", "a"), Piece("tool_call", id="i")):
        each, _ = writer()
        each.write([piece])
        assert each.spoken


def test_an_answer_is_complete_with_a_finish_reason_for_each_choice() -> None:
    """The first that comes for a choice is its own."""
    each, _ = writer(choices=2)
    each.write([Piece("finish", "stop", choice=1), Piece("finish", "length", choice=1)])
    assert not each.complete
    each.write([Piece("finish", "tool_calls")])
    assert each.complete and each.finish_reasons == {0: "tool_calls", 1: "stop"}


def test_usage_is_what_the_upstream_counted() -> None:
    """Its last word, with everything in it; a total that it left out is added."""
    each, _ = writer()
    details = {"cached_tokens": 2}
    each.write([Piece("usage", extra={"prompt_tokens": 1, "completion_tokens": 1})])
    assert each.usage([]) == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    counted = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 9, "details": details}
    each.write([Piece("usage", extra=counted)])
    assert each.usage([]) == counted


def test_usage_is_estimated_where_nobody_counted() -> None:
    """A token for four characters, rounded up, of the messages and of all that was said; it says
    that it is an estimate.
    """
    each, _ = writer()
    messages = [{"role": "user", "content": "éééé"}, {"role": "user", "content": "a"}]
    assert each.usage(messages) == {
        "prompt_tokens": 2,
        "completion_tokens": 0,
        "total_tokens": 2,
        "estimated": True,
    }
    extra = {"logprobs": {"content": [{"token": "ééé", "top_logprobs": list(range(100))}]}}
    each.write([Piece("text", "ééé"), Piece("text", "ééé", extra=extra)])
    each.write([Piece("reasoning", "abc"), Piece("tool_call", "{{}}", id="i", name="long name")])
    each.close_parts()
    assert each.usage(messages)["completion_tokens"] == 4


def test_message_chars() -> None:
    """Characters of text; images and what is no text count nothing."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    parts = [{"type": "text", "text": "abc"}, image, "odd", {"type": "text", "text": None}]
    assert message_chars({"content": "éa"}) == 2
    assert message_chars({"content": parts}) == 3
    assert [message_chars(odd) for odd in ({}, {"content": None}, {"content": 5})] == [0, 0, 0]


@pytest.mark.parametrize(
    "piece",
    [
        Piece("text", "x" * 100),
        Piece("reasoning", "é" * 50),
        Piece("tool_call", "x" * 100, id="i", name="n"),
        Piece("text", "x", extra={"logprobs": {"content": [{"token": "x" * 100}]}}),
    ],
    ids=["text", "reasoning", "tool call", "log probabilities"],
)
def test_an_answer_can_be_too_long(piece: Piece) -> None:
    """Whatever it is made of, it ends where its log passes the bound; what came is in the log."""
    each, log = writer(max_bytes=2000)
    with pytest.raises(UpstreamError) as failure:
        for _ in range(40):
            each.write([piece])
    assert failure.value.code == "too_long"
    assert 2000 < log.size < 2300
    each, log = writer(max_bytes=2000)
    each.write([piece] * 8)
    assert log.size < 2000


def test_an_answer_may_end_where_each_choice_that_began_is_done() -> None:
    """Also where fewer came than were asked for; not in the midst of one."""
    each, _ = writer(choices=3)
    assert not each.whole
    each.write([Piece("text", "A"), Piece("tool_call", "{}", choice=1), Piece("finish", "stop")])
    assert not each.whole
    each.write([Piece("finish", "tool_calls", choice=1)])
    assert each.whole
    assert not each.complete
