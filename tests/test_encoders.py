"""Framings: how a dialect's objects become bytes, and the rules at the top of wire.md."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
)
from streaming.encoders import (
    FRAMINGS,
    NDJSON,
    NDJSON_BRACES,
    SSE,
    TEXT,
    Encoder,
    Framing,
    encoder,
)
from streaming.events import Event
from tests.properties import property_test
from tests.readers import Braces, DataBlocks, DataLines, Message, Ndjson, Sse
from tests.samples import (
    ANSWER,
    CANCELLED,
    EVERY,
    FAILED,
    FINISHED,
    HELLO,
    PART_STARTED,
    STAMP,
    STREAM,
    TIME,
    text,
)

ALL = [*DIALECTS.values(), CONTENT_WITHOUT_DONE, OPENAI]
ALL_FRAMINGS = [SSE, NDJSON, NDJSON_BRACES, TEXT]
BOTH = [(d, f) for d in ALL for f in ALL_FRAMINGS if f is not NDJSON_BRACES or d is CONTENT]
# Whatever some reader might take for a line's end, an event's end, or the end of everything.
NASTY = "\r\n\n\r\u2028\u2029\u0085\v\f\0\ufeff}{\"'\\ data: [DONE]\n\nid: x-1\nevent: error\n\n🌊"
texts = st.text() | st.text(alphabet=list(NASTY)) | st.just(NASTY)
events_of_log = st.lists(st.sampled_from(EVERY) | st.builds(text, texts), max_size=12)


def sse(dialect: Dialect, *events: Event) -> bytes:
    return Encoder(dialect, SSE).encode(events)


def parse(data: bytes) -> list[Message]:
    """By the rules of the HTML standard, byte by byte."""
    parser = Sse()
    return [message for i in range(len(data)) for message in parser.feed(data[i : i + 1])]


def objects(dialect: Dialect, *events: Event, ids: bool = False) -> list[Any]:
    """What the dialect says, without `[DONE]`; with the id at the end of each where asked."""
    return [
        {**item, "id": str(each.id)} if ids else item
        for each in events
        for item in dialect.say(each) or ()
        if item is not DONE
    ]


# SSE


@property_test
@given(events_of_log, st.sampled_from(ALL))
def test_any_text_survives_sse(events: list[Event], dialect: Dialect) -> None:
    """A reader by the standard gets each object in a message of its own, whatever its text has in
    it; `[DONE]` where the dialect has one.
    """
    expected = [
        "[DONE]" if item is DONE else item | ({"id": str(each.id)} if dialect is NATIVE else {})
        for each in events
        for item in dialect.say(each) or ()
        if item is not DONE or dialect.done
    ]
    data = [message.data for message in parse(sse(dialect, *events))]
    assert [each if each == "[DONE]" else json.loads(each) for each in data] == expected


@property_test
@given(events_of_log, st.sampled_from(ALL))
def test_an_object_is_one_data_line(events: list[Event], dialect: Dialect) -> None:
    """So that a reader gets it who takes each line that begins with `data: `."""
    lines = sse(dialect, *events).decode().split("\n")
    said = [line[6:] for line in lines if line.startswith("data: {")]
    assert [json.loads(line) for line in said] == objects(dialect, *events, ids=dialect is NATIVE)


def test_content_has_its_ids_in_blocks_of_their_own() -> None:
    """After the data, in the same write; that of the start at once, the ending's after `[DONE]`."""
    assert (
        sse(CONTENT, *ANSWER)
        == (
            f"id: {STREAM}-1\n\n"
            'data: {"content":"Hello"}\n\n'
            f"id: {STREAM}-3\n\n"
            "data: [DONE]\n\n"
            f"id: {STREAM}-5\n\n"
        ).encode()
    )


def test_content_without_done() -> None:
    """The ending's id follows the last data."""
    assert (
        sse(CONTENT_WITHOUT_DONE, HELLO, FINISHED)
        == (f'data: {{"content":"Hello"}}\n\nid: {STREAM}-3\n\nid: {STREAM}-5\n\n').encode()
    )


def test_a_failure_in_content_has_its_id_after_it() -> None:
    """And no `[DONE]`."""
    assert (
        sse(CONTENT, CANCELLED)
        == (f'data: {{"error":"Stopped","code":"cancelled"}}\n\nid: {STREAM}-5\n\n').encode()
    )


def test_content_reads_as_bare_data_blocks() -> None:
    """For readers that expect each block to be one `data: ` line, and for those that take lines."""
    data = sse(CONTENT, *ANSWER)
    assert DataBlocks().feed(data) == DataLines().feed(data) == ['{"content":"Hello"}', "[DONE]"]


def test_chat_has_its_id_before_the_data() -> None:
    """In the event's own block, which names no event."""
    assert (
        sse(CHAT, PART_STARTED, HELLO)
        == (
            f"id: {STREAM}-3\n"
            'data: {"type":"chunk","content":"Hello","conversation_id":"c1",'
            f'"timestamp":"{STAMP}","metadata":{{"model":"m"}}}}\n\n'
        ).encode()
    )


def test_tool_has_its_id_before_the_data() -> None:
    """`[DONE]` has none: what it would resume from is the end already."""
    assert (
        sse(TOOL, FINISHED)
        == (
            f"id: {STREAM}-5\n"
            'data: {"type":"done","usage":{"promptTokens":3,"completionTokens":5}}\n\n'
            "data: [DONE]\n\n"
        ).encode()
    )


def test_native_repeats_id_and_type() -> None:
    """In the block and in the object, whose last member is the id."""
    assert (
        sse(NATIVE, HELLO)
        == (
            f"id: {STREAM}-3\n"
            "event: delta\n"
            f'data: {{"type":"delta","time":{TIME},'
            f'"data":{{"stream_id":"{STREAM}","part":0,"kind":"text","content":"Hello"}},'
            f'"id":"{STREAM}-3"}}\n\n'
        ).encode()
    )


@pytest.mark.parametrize("dialect", [OPENAI, OPENAI_WITH_USAGE])
def test_openai_has_no_ids(dialect: Dialect) -> None:
    """Nothing but `data:` lines."""
    lines = sse(dialect, *EVERY).splitlines()
    assert all(line.startswith(b"data: ") for line in lines if line)
    assert {message.id for message in parse(sse(dialect, *EVERY))} == {""}


RESUMABLE = [CONTENT, CONTENT_WITHOUT_DONE, CHAT, TOOL, NATIVE]


@pytest.mark.parametrize("dialect", RESUMABLE)
def test_an_event_source_knows_how_far_it_is(dialect: Dialect) -> None:
    """After each event that it hears of it would resume from there: no sooner, or that event would
    be lost, and no later, but for *content* cut between the data and its id.
    """
    parser, last = Sse(), ""
    for each in ANSWER:
        data = sse(dialect, each)
        if data:
            last = str(each.id)
        parser.feed(data)
        assert parser.last_event_id == last
    assert last == str(FINISHED.id)


# NDJSON


@property_test
@given(events_of_log, st.sampled_from(ALL))
def test_ndjson_is_one_object_a_line(events: list[Event], dialect: Dialect) -> None:
    """Whatever the text; every object of a dialect with ids ends with its own."""
    data = Encoder(dialect, NDJSON).encode(events)
    assert data.endswith(b"\n") or not data
    lines = [json.loads(line) for line in data.split(b"\n")[:-1]]
    assert lines == objects(dialect, *events, ids=dialect.ids != "none")
    assert all(list(line)[-1] == "id" for line in lines if dialect.ids != "none")
    assert Ndjson().feed(data) == lines


def test_ndjson_says_nothing_but_the_dialect() -> None:
    """No `[DONE]`, no blank line, no line for the start."""
    assert Encoder(CONTENT, NDJSON).encode(ANSWER) == (
        f'{{"content":"Hello","id":"{STREAM}-3"}}\n'.encode()
    )
    assert (
        Encoder(CONTENT, NDJSON).encode([FAILED])
        == (
            '{"error":"the model\'s connection was cut","code":"upstream_cut",'
            f'"id":"{STREAM}-5"}}\n'
        ).encode()
    )


@property_test
@given(st.lists(texts.map(text) | st.sampled_from([FAILED, CANCELLED]), max_size=8))
def test_a_brace_ends_an_object(events: list[Event]) -> None:
    """Where readers look for `}`, it is the last character of each line and nowhere else; to all
    others the objects are the same.
    """
    data = Encoder(CONTENT, NDJSON_BRACES).encode(events)
    lines = data.split(b"\n")[:-1]
    assert all(line.index(b"}") == len(line) - 1 for line in lines)
    assert [json.loads(line) for line in lines] == objects(CONTENT, *events, ids=True)
    assert Braces().feed(data) == objects(CONTENT, *events, ids=True)


# Text


@property_test
@given(events_of_log, st.sampled_from(ALL))
def test_text_is_the_bare_answer(events: list[Event], dialect: Dialect) -> None:
    """Nothing but it: no id, no error, no thought."""
    data = Encoder(dialect, TEXT).encode(events)
    assert data.decode() == "".join(each.data["content"] for each in events if is_text(each))


# All of them


@property_test
@given(events_of_log, st.sampled_from(BOTH), st.data())
def test_an_encoder_is_pure(
    events: list[Event], both: tuple[Dialect, Framing], data: st.DataObject
) -> None:
    """Encoding a list is encoding its parts, so it does not matter who was caught up when; and the
    same events give the same bytes again, so readers can share them.
    """
    each = Encoder(*both)
    cut = data.draw(st.integers(0, len(events)))
    whole = each.encode(events)
    assert whole == each.encode(events[:cut]) + each.encode(events[cut:])
    assert whole == b"".join(each.encode([event]) for event in events)
    assert whole == each.encode(iter(events))


@pytest.mark.parametrize("both", BOTH, ids=lambda both: f"{both[0].name} {both[1].name}")
def test_nothing_is_no_bytes(both: tuple[Dialect, Framing]) -> None:
    """No event gives no byte, so nothing is written."""
    assert Encoder(*both).encode([]) == b""


def test_the_framings_by_name() -> None:
    """As `format=` names them, with their media types."""
    assert {name: f.media_type for name, f in FRAMINGS.items()} == {
        "sse": "text/event-stream",
        "ndjson": "application/x-ndjson",
        "text": "text/plain",
    }
    assert (NDJSON_BRACES.name, NDJSON_BRACES.media_type) == (NDJSON.name, NDJSON.media_type)


def test_readers_of_a_kind_share_one_encoder() -> None:
    """Equal ones are the same, so that a feed groups by it; different ones differ."""
    assert encoder(CHAT, SSE) is encoder(CHAT, SSE)
    kinds = [encoder(CHAT, SSE), encoder(CHAT, NDJSON), encoder(TOOL, SSE), encoder(CHAT, SSE, "h")]
    assert len(set(kinds)) == 4


def test_sse_opens_with_a_comment() -> None:
    """At once, so that headers and proxies let go; not *openai*, whose status waits, and not in
    framings without comments.
    """
    for dialect in (CONTENT, CHAT, TOOL, NATIVE):
        opening = Encoder(dialect, SSE).opening
        assert opening.startswith(b":") and parse(opening) == []
        assert Encoder(dialect, NDJSON).opening == Encoder(dialect, TEXT).opening == b""
    assert Encoder(OPENAI, SSE).opening == Encoder(OPENAI_WITH_USAGE, SSE).opening == b""


def test_a_heartbeat_is_a_comment() -> None:
    """In SSE, where it disturbs no event. Elsewhere there is none: a blank line breaks readers."""
    for dialect in ALL:
        heartbeat = Encoder(dialect, SSE).heartbeat(TIME)
        assert heartbeat.startswith(b":") and heartbeat.endswith(b"\n\n")
        assert parse(heartbeat) == []
        for framing in (NDJSON, NDJSON_BRACES, TEXT):
            assert Encoder(dialect, framing).heartbeat(TIME) == b""


def test_a_heartbeat_can_be_an_event() -> None:
    """Where a client asks for it by name, as comments are invisible to JavaScript: in SSE and
    NDJSON without an id, which leaves the reader's position alone. The bare text has no place for
    it.
    """
    named = {f.name: Encoder(CHAT, f, "still-here").heartbeat(TIME) for f in FRAMINGS.values()}
    assert named == {
        "sse": b'event: still-here\ndata: {"timestamp":1763719200000}\n\n',
        "ndjson": b'{"type":"still-here","timestamp":1763719200000}\n',
        "text": b"",
    }
    parser = Sse()
    parser.feed(sse(CHAT, HELLO) + named["sse"])
    assert parser.last_event_id == str(HELLO.id)


@pytest.mark.parametrize("framing", ALL_FRAMINGS, ids=lambda f: f.name)
@pytest.mark.parametrize("dialect", ALL, ids=lambda d: d.name)
def test_what_has_no_word_for_a_failure_is_cut(dialect: Dialect, framing: Framing) -> None:
    """Bare text, and *openai*, whose clients take a clean end for success."""
    assert Encoder(dialect, framing).cuts == (framing is TEXT or dialect.name == "openai")


@pytest.mark.parametrize("both", BOTH, ids=lambda both: f"{both[0].name} {both[1].name}")
@pytest.mark.parametrize("ending", [FAILED, CANCELLED], ids=lambda e: e.type)
def test_a_failure_never_looks_finished(both: tuple[Dialect, Framing], ending: Event) -> None:
    """Each encoding says it, or is cut; only *tool* has a `[DONE]` after its error."""
    each = Encoder(*both)
    assert each.cuts or each.encode([ending])
    assert (b"[DONE]" in each.encode([ending])) == (both == (TOOL, SSE))
    assert each.encode([ending]) != each.encode([FINISHED]) or both[1] is TEXT
