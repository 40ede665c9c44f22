"""The decoder of upstream chunks: any boundaries, any habits of upstreams, any bytes at all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.decoder import EVENT_BYTES, MESSAGE_CHARS, ChunkDecoder
from streaming.errors import UpstreamError
from streaming.models import Piece
from tests.properties import property_test

FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
DONE = b"data: [DONE]\n\n"
STOP = Piece("finish", "stop")


class Decoded(NamedTuple):
    pieces: list[Piece]  # adjacent text joined: how it was cut into pieces does not matter
    failure: str
    done: bool


def decode(reads: Iterable[bytes]) -> Decoded:
    """As an upstream's body is decoded: read by read until it is done or has failed."""
    decoder = ChunkDecoder()
    pieces: list[Piece] = []
    for data in reads:
        pieces += decoder.feed(data)
        if decoder.failure is not None or decoder.done:
            break
    else:
        pieces += decoder.eof()
    return Decoded(joined(pieces), decoder.failure.code if decoder.failure else "", decoder.done)


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if (
            last is not None
            and piece.kind in ("text", "reasoning", "refusal")
            and piece._replace(text="") == last._replace(text="")
            and piece.extra is None
        ):
            result[-1] = last._replace(text=last.text + piece.text)
        else:
            result.append(piece)
    return result


def sse(*chunks: object) -> bytes:
    return b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)


def delta(choice: int = 0, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "id": "c",
        "choices": [{"index": choice, "delta": fields, "finish_reason": finish}],
    }


def said(text: str) -> bytes:
    return sse(delta(content=text))


def tool(fragment: str = "", place: int | None = 0, **head: Any) -> dict[str, Any]:
    function = {"arguments": fragment, **({"name": head.pop("name")} if "name" in head else {})}
    return {**({} if place is None else {"index": place}), **head, "function": function}


# What a chunk means

USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8, "details": {"cached": 1}}
LOGPROBS = {"content": [{"token": "Hi", "logprob": -0.5}], "refusal": None}
MEANINGS: dict[str, tuple[dict[str, Any], list[Piece]]] = {
    "text": (delta(content="Hi"), [Piece("text", "Hi")]),
    "the role": (delta(role="assistant", content="", refusal=None), []),
    "empty text": (delta(content=""), []),
    "no text": (delta(content=None), []),
    "text and the role": (delta(role="assistant", content="Hi"), [Piece("text", "Hi")]),
    "text with nulls": (
        {**delta(content="Hi", tool_calls=None, refusal=None, audio=None), "usage": None},
        [Piece("text", "Hi")],
    ),
    "text in parts": (
        delta(content=[{"type": "text", "text": "H"}, {"type": "image"}, {"text": "i"}]),
        [Piece("text", "Hi")],
    ),
    "a whole message": (
        {"choices": [{"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]},
        [Piece("text", "Hi"), STOP],
    ),
    "no index": ({"choices": [{"delta": {"content": "Hi"}}]}, [Piece("text", "Hi")]),
    "a thought": (delta(reasoning_content="Hm"), [Piece("reasoning", "Hm")]),
    "a thought by another name": (delta(reasoning="Hm"), [Piece("reasoning", "Hm")]),
    "a thought by both names": (
        delta(reasoning_content="Hm", reasoning="Hm"),
        [Piece("reasoning", "Hm")],
    ),
    "a thought and text": (
        delta(reasoning_content="Hm", content="Hi"),
        [Piece("reasoning", "Hm"), Piece("text", "Hi")],
    ),
    "a refusal": (delta(refusal="No"), [Piece("refusal", "No")]),
    "the first fragment of a call": (
        delta(tool_calls=[tool("", 0, id="call_1", type="function", name="f")]),
        [Piece("tool_call", "", id="call_1", name="f")],
    ),
    "a fragment of arguments": (
        delta(tool_calls=[tool('{"a', 2)]),
        [Piece("tool_call", '{"a', place=2)],
    ),
    "two calls without an index": (
        delta(tool_calls=[tool("1", None, id="a"), tool("2", None, id="b")]),
        [Piece("tool_call", "1", place=0, id="a"), Piece("tool_call", "2", place=1, id="b")],
    ),
    "arguments as an object": (
        delta(tool_calls=[{"index": 0, "function": {"arguments": {"a": 1}}}]),
        [Piece("tool_call", '{"a":1}')],
    ),
    "log probabilities": (
        {"choices": [{"index": 0, "delta": {"content": "Hi"}, "logprobs": LOGPROBS}]},
        [Piece("text", "Hi", extra={"logprobs": LOGPROBS})],
    ),
    "log probabilities that are none": (
        {"choices": [{"index": 0, "delta": {"content": "Hi"}, "logprobs": [1]}]},
        [Piece("text", "Hi")],
    ),
    "unknown fields of the delta": (
        delta(content="Hi", annotations=[1], audio=None),
        [Piece("text", "Hi", extra={"annotations": [1]})],
    ),
    "the second answer": (delta(choice=1, content="Hi"), [Piece("text", "Hi", choice=1)]),
    "several answers": (
        {"choices": [{"index": 1, "delta": {"content": "B"}}, {"delta": {"content": "A"}}]},
        [Piece("text", "B", choice=1), Piece("text", "A")],
    ),
    "a finish reason": (delta(finish="length"), [Piece("finish", "length")]),
    "text and a finish reason": (delta(finish="stop", content="Hi"), [Piece("text", "Hi"), STOP]),
    "usage": ({"choices": [], "usage": USAGE}, [Piece("usage", extra=USAGE)]),
    "usage beside text": (
        {**delta(content="Hi"), "usage": USAGE},
        [Piece("text", "Hi"), Piece("usage", extra=USAGE)],
    ),
    "no choices": ({"choices": []}, []),
    "choices of null": ({"choices": None, "usage": USAGE}, [Piece("usage", extra=USAGE)]),
    "nothing": ({}, []),
    "no error": ({**delta(content="Hi"), "error": None}, [Piece("text", "Hi")]),
}


@pytest.mark.parametrize(("chunk", "pieces"), MEANINGS.values(), ids=MEANINGS.keys())
def test_what_a_chunk_means(chunk: dict[str, Any], pieces: list[Piece]) -> None:
    """The pieces that it gives, in order."""
    decoder = ChunkDecoder()
    assert (decoder.feed(sse(chunk)), decoder.failure) == (pieces, None)


def test_adjacent_text_in_one_read_is_one_piece() -> None:
    """However many chunks it came in, up to what is no plain text."""
    decoder = ChunkDecoder()
    data = b"".join(map(said, "abc")) + sse(delta(refusal="No")) + b"".join(map(said, "de"))
    assert decoder.feed(data) == [Piece("text", "abc"), Piece("refusal", "No"), Piece("text", "de")]


# Boundaries and habits

KINDS = list(MEANINGS.values())
texts = st.text(max_size=6) | st.sampled_from(["\u2028", "\u0085", "\r\n", "\0", "data: ", "🌊é"])
chunks = st.sampled_from(KINDS) | texts.map(
    lambda text: (delta(content=text), [Piece("text", text)] if text else [])
)


def dressed(chunk: object, line_end: bytes, habit: str, ascii: bool) -> bytes:
    """One event as some upstream writes it."""
    body = json.dumps(chunk, ensure_ascii=ascii, indent=1 if habit == "pretty" else None).encode()
    lines = [b"data: " + line for line in body.split(b"\n")]
    match habit:
        case "comment":
            lines[:0] = [b": keepalive", b"", b": OPENROUTER PROCESSING", b""]
        case "fields":
            lines[:0] = [b"event: message", b"id: 7", b"retry: 100"]
        case "no space":
            lines = [line.replace(b"data: ", b"data:", 1) for line in lines]
        case "spaces":
            lines = [line.replace(b"data: ", b"data:   ", 1) + b"  " for line in lines]
        case "no blank line":
            return lines[0] + line_end
    return line_end.join([*lines, b"", b""])


HABITS = ["plain", "pretty", "comment", "fields", "no space", "spaces", "no blank line"]
events = st.lists(
    st.builds(
        lambda chunk, *style: (dressed(chunk[0], *style), chunk[1]),
        chunks,
        st.sampled_from([b"\n", b"\r\n"]),
        st.sampled_from(HABITS),
        st.booleans(),
    ),
    max_size=12,
)
endings = st.sampled_from([b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n", b"data: [DONE]", b""])


@property_test
@given(events, endings, st.data())
def test_boundaries_change_nothing(
    events: list[tuple[bytes, list[Piece]]], ending: bytes, data: st.DataObject
) -> None:
    """Any stream of chunks, written by any upstream, cut between any bytes: the same pieces."""
    body = b"".join(event for event, _ in events) + sse(FINISH) + ending
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=20)))
    expected = Decoded(
        joined([*(piece for _, pieces in events for piece in pieces), STOP]), "", bool(ending)
    )
    assert decode(pieces_of(body, cuts)) == expected
    assert decode([body]) == expected
    assert decode(body[i : i + 1] for i in range(len(body))) == expected


def pieces_of(body: bytes, cuts: Sequence[int]) -> list[bytes]:
    return [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]


def test_every_cut_in_two() -> None:
    """Of one stream with everything in it."""
    body = b"".join(
        dressed(chunk, (b"\n", b"\r\n")[i % 2], HABITS[i % len(HABITS)], False)
        for i, (chunk, _) in enumerate([*KINDS, (delta(content="\u2028é🌊"), [])])
    )
    body += sse(FINISH) + DONE
    whole = decode([body])
    assert (whole.failure, whole.done, whole.pieces[-2].text) == ("", True, "Hi\u2028é🌊")
    for at in range(len(body)):
        assert decode([body[:at], body[at:]]) == whole


def test_line_ends_of_unicode_are_text() -> None:
    """U+2028, U+2029, U+0085 and the like inside JSON end no line."""
    text = "a\u2028b\u2029c\u0085d\u000be\u000cf\u001cg"
    body = b"data: " + json.dumps(delta(content=text), ensure_ascii=False).encode() + b"\n\n"
    assert decode([body, sse(FINISH)]).pieces == [Piece("text", text), STOP]


def test_a_long_line_in_many_reads_takes_linear_time() -> None:
    """4 MB in reads of 64 bytes; the square of that would take minutes."""
    body = said("x" * (4 << 20)) + sse(FINISH)
    begin = time.process_time()
    decoded = decode(body[i : i + 64] for i in range(0, len(body), 64))
    assert time.process_time() - begin < 5
    assert decoded.pieces == [Piece("text", "x" * (4 << 20)), STOP]


def test_an_event_of_many_lines_takes_linear_time() -> None:
    """100,000 data lines of one object."""
    lines = [b'data: {"choices": [], "pad": [0']
    lines += [b"data: ,0"] * 100_000
    lines += [b'data: ], "usage": {"total_tokens": 1}}', b"", b""]
    begin = time.process_time()
    decoded = decode([b"\n".join(lines), sse(FINISH)])
    assert time.process_time() - begin < 5
    assert decoded.pieces == [Piece("usage", extra={"total_tokens": 1}), STOP]


@pytest.mark.parametrize("piece", [b"x" * (1 << 20), b"data: %b\n" % (b"[" * 1000) * 1000])
def test_an_endless_event_is_refused(piece: bytes) -> None:
    """In one line or in many: an upstream cannot fill the memory."""
    decoder = ChunkDecoder()
    fed = 0
    while decoder.failure is None:
        assert fed <= 3 * EVENT_BYTES
        assert decoder.feed(piece) == []
        fed += len(piece)
    assert decoder.failure.code == "upstream_invalid"


# Endings

HI = Piece("text", "Hi")
ENDINGS: dict[str, tuple[bytes, Decoded]] = {
    "a finish reason and [DONE]": (said("Hi") + sse(FINISH) + DONE, Decoded([HI, STOP], "", True)),
    "[DONE] without a line end": (
        said("Hi") + sse(FINISH) + b"data: [DONE]",
        Decoded([HI, STOP], "", True),
    ),
    "[DONE] without a space": (
        said("Hi") + sse(FINISH) + b"data:[DONE]\n",
        Decoded([HI, STOP], "", True),
    ),
    "a finish reason": (said("Hi") + sse(FINISH), Decoded([HI, STOP], "", False)),
    "a finish reason without a line end": (
        said("Hi") + sse(FINISH).strip(),
        Decoded([HI, STOP], "", False),
    ),
    "whatever follows [DONE]": (
        said("Hi") + sse(FINISH) + DONE + b"data: junk\n\n" + said("more"),
        Decoded([HI, STOP], "", True),
    ),
    "no finish reason": (said("Hi"), Decoded([HI], "", False)),
    "[DONE] without a finish reason": (said("Hi") + DONE, Decoded([HI], "", True)),
    "[DONE] alone": (DONE, Decoded([], "", True)),
    "nothing": (b"", Decoded([], "", False)),
    "only comments": (b": hello\n\n: hello\n", Decoded([], "", False)),
    "half a line": (said("Hi") + b'data: {"choi', Decoded([HI], "upstream_invalid", False)),
    "bad JSON": (
        said("Hi") + b"data: {bad}\n\n" + said("more") + sse(FINISH) + DONE,
        Decoded([HI], "upstream_invalid", False),
    ),
    "bytes that are no UTF-8": (
        said("Hi") + b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        Decoded([HI], "upstream_invalid", False),
    ),
    "half a surrogate pair": (
        said("Hi") + b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n',
        Decoded([HI], "upstream_invalid", False),
    ),
    "a page of HTML": (
        b"<html>\n<body>\n\ndata: <h1>502</h1>\n\n</body>\n",
        Decoded([], "upstream_invalid", False),
    ),
    "an error object": (
        said("Hi") + sse({"error": {"message": "overloaded", "code": 500}}) + DONE,
        Decoded([HI], "upstream_failed", False),
    ),
    "an error event": (
        said("Hi") + b'event: error\ndata: {"message": "overloaded"}\n\n' + sse(FINISH),
        Decoded([HI], "upstream_failed", False),
    ),
    "an error event in several lines": (
        said("Hi") + b'event: error\r\ndata: {"message":\r\ndata: "no"}\r\n\r\n' + sse(FINISH),
        Decoded([HI], "upstream_failed", False),
    ),
    "an empty error event": (
        said("Hi") + b"event:error\ndata:{}\n\n" + sse(FINISH),
        Decoded([HI], "upstream_failed", False),
    ),
    "data without a word": (
        said("Hi") + b"data:\n\ndata: \r\n\r\n" + sse(FINISH),
        Decoded([HI, STOP], "", False),
    ),
    "an error event without data": (
        said("Hi") + b"event: error\n\n" + sse(FINISH),
        Decoded([HI, STOP], "", False),
    ),
    "an error that is only a text": (
        said("Hi") + sse({"error": "overloaded"}),
        Decoded([HI], "upstream_failed", False),
    ),
    "an error of too many requests": (
        sse({"error": {"message": "slow down", "type": "rate_limit_exceeded"}}),
        Decoded([], "upstream_rate_limited", False),
    ),
    "an error beside a choice": (
        sse({**delta(content="Hi"), "error": {"code": 429, "message": "m"}}),
        Decoded([], "upstream_rate_limited", False),
    ),
    "an event of another name": (
        b'event: ping\ndata: {"type": "ping"}\n\n' + said("Hi") + sse(FINISH),
        Decoded([HI, STOP], "", False),
    ),
}


@pytest.mark.parametrize(("body", "expected"), ENDINGS.values(), ids=ENDINGS.keys())
def test_how_a_stream_ends(body: bytes, expected: Decoded) -> None:
    """Whole or byte by byte: what came before a failure is given, and nothing after it."""
    assert decode([body]) == expected
    assert decode(body[i : i + 1] for i in range(len(body))) == expected


def test_an_error_keeps_the_upstreams_message() -> None:
    """Its beginning, and nothing that UTF-8 could not say."""
    for error in ({"message": "x" * 5000}, "x" * 5000, {"detail": "x" * 5000}):
        failure = failure_of(sse({"error": error}))
        assert "x" * 900 in failure.message and len(failure.message) == MESSAGE_CHARS


def failure_of(body: bytes) -> UpstreamError:
    decoder = ChunkDecoder()
    decoder.feed(body)
    assert decoder.failure is not None
    return decoder.failure
