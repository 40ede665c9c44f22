"""Whatever an upstream sends: the decoder never raises, and what it gives can be written into a log
and said in every dialect. Else one odd chunk would break every reader of its answer.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.decoder import ChunkDecoder
from streaming.dialects import CONTENT_WITHOUT_DONE, DIALECTS, OPENAI, completion
from streaming.encoders import NDJSON, NDJSON_BRACES, SSE, TEXT, Encoder
from streaming.errors import UpstreamError
from streaming.log import Log
from streaming.models import Piece
from streaming.upstream import refusal
from streaming.writer import Writer
from tests.properties import property_test
from tests.samples import ORIGIN, STREAM
from tests.test_decoder import FINISH, delta, sse

DIALECTS_AND_FRAMINGS = [
    Encoder(dialect, framing)
    for dialect in (*DIALECTS.values(), CONTENT_WITHOUT_DONE, OPENAI)
    for framing in (SSE, NDJSON, TEXT)
]
ENCODERS = [*DIALECTS_AND_FRAMINGS, Encoder(DIALECTS["content"], NDJSON_BRACES)]

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object with some of these fields, each as it should be or anything."""
    return st.fixed_dictionaries({}, optional={k: v | anything for k, v in fields.items()})


functions = maybe(name=st.text(max_size=4), arguments=st.text(max_size=4))
calls = maybe(index=st.integers(0, 3), id=st.text(max_size=4), function=functions)
deltas = maybe(
    role=st.just("assistant"),
    content=st.text(max_size=4) | st.lists(maybe(text=st.text(max_size=4)), max_size=2),
    reasoning=st.text(max_size=4),
    reasoning_content=st.text(max_size=4),
    refusal=st.text(max_size=4),
    tool_calls=st.lists(calls | anything, max_size=3),
    logprobs=anything,
    extra=anything,
)
logprobs = maybe(content=st.lists(anything, max_size=2), refusal=st.none())
choices = maybe(
    index=st.integers(0, 3),
    delta=deltas,
    message=deltas,
    finish_reason=st.just("stop"),
    logprobs=logprobs,
)
usages = maybe(
    prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9), total_tokens=anything
)
errors = maybe(message=st.text(max_size=4), code=anything, type=st.just("rate_limit"))
chunks = maybe(choices=st.lists(choices | anything, max_size=3), usage=usages, error=errors)


def written(body: bytes) -> Log:
    """The log of an answer that this body gave, up to the first thing that was no chunk."""
    log = Log(ORIGIN, epoch=STREAM)
    log.append("started", {"model": "m"})
    writer, decoder = Writer(log, 1, 1 << 20), ChunkDecoder()
    pieces = [*decoder.feed(body), *decoder.eof()]
    for piece in pieces:
        check(piece)
    writer.write(pieces)
    writer.close_parts()
    reasons = {str(choice): reason for choice, reason in writer.finish_reasons.items()}
    usage = writer.usage([{"role": "user", "content": "Hi"}])
    data: dict[str, Any] = {"finish_reason": "stop", "usage": usage, "model": "m"}
    log.append("finished", {**data, "finish_reasons": reasons} if len(reasons) > 1 else data)
    return log


def check(piece: Piece) -> None:
    """That it is what the others are promised."""
    assert piece.kind in ("text", "reasoning", "refusal", "tool_call", "finish", "usage")
    assert all(type(text) is str for text in (piece.text, piece.id, piece.name))
    assert type(piece.choice) is type(piece.place) is int
    assert piece.extra is None or isinstance(piece.extra, dict)
    assert piece.text or piece.extra or piece.kind in ("tool_call", "usage")


def check_readers(log: Log) -> None:
    """That each of them gets the whole answer, merged or not."""
    for merge in (True, False):
        events = log.read(0, merge=merge)
        for each in ENCODERS:
            assert isinstance(each.encode(events), bytes)
        answer = completion(events)
        assert answer["choices"] and orjson.dumps(answer)


@property_test
@given(st.lists(st.binary() | st.sampled_from([b"data:", b"event: error", b"\n", b"\r\n", b"{}"])))
def test_any_bytes(parts: list[bytes]) -> None:
    """Neither raise nor look like a whole answer: there is no finish reason in them."""
    decoder = ChunkDecoder()
    for part in parts:
        decoder.feed(part)
    decoder.eof()
    assert not decoder.finished


@property_test
@given(st.lists(chunks | anything, max_size=4))
def test_any_json(values: list[Any]) -> None:
    """As chunks: what is odd is passed on if it can be said, or ends the answer as a failure."""
    check_readers(written(sse(*values)))


@pytest.mark.parametrize("levels", [100, *range(240, 260), 1000, 5000])
@pytest.mark.parametrize(
    "place", ["content", "tool_calls", "anything", "error", "usage", "logprobs", "finish_reason"]
)
def test_any_depth(place: str, levels: int) -> None:
    """JSON can be read deeper than it can be written: what is too deep to be said is refused."""
    chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": None}]}
    if place in ("error", "usage"):
        chunk[place] = {"message": "@", "total_tokens": "@"}
    elif place in ("logprobs", "finish_reason"):
        chunk["choices"][0][place] = {"content": ["@"]}
    elif place == "tool_calls":
        chunk["choices"][0]["delta"][place] = [{"function": {"arguments": "@"}}]
    else:
        chunk["choices"][0]["delta"] = {place: "@"}
    deep = b'{"a":' * levels + b"1" + b"}" * levels
    check_readers(written(sse(chunk, FINISH).replace(b'"@"', deep)))


@pytest.mark.parametrize(
    "number", ["1e308", "-1", "1.5", "true", '"2"', '"x"', "99999999999", "[]"]
)
@pytest.mark.parametrize("place", ["choice", "call"])
def test_any_index(number: str, place: str) -> None:
    """One that no JSON of ours could say is no index."""
    index = b'"index":%b' % number.encode()
    call = index if place == "call" else b'"index":0'
    choice = index if place == "choice" else b'"index":0'
    calls = b'{"tool_calls":[{%b,"function":{"arguments":"{}"}}]}' % call
    body = b'data: {"choices":[{%b,"delta":%b,"finish_reason":"stop"}]}\n\n' % (choice, calls)
    check_readers(written(body))


@pytest.mark.parametrize("odd", [None, -1, 1e300, 2**64 - 1, "7", [7], {"a": 7}], ids=repr)
def test_counts_that_are_none(odd: Any) -> None:
    """Odd usage gives numbers all the same, and keeps what else the upstream said in it."""
    usage = {"prompt_tokens": odd, "completion_tokens": 5.0, "total_tokens": odd, "more": {"a": 1}}
    log = written(sse(delta(content="Hi"), FINISH, {"choices": [], "usage": usage}))
    assert log.read(0)[-1].data["usage"] == {
        "prompt_tokens": 0,
        "completion_tokens": 5,
        "total_tokens": 5,
        "more": {"a": 1},
    }
    check_readers(log)


# Refusals before the stream, as the SDK raises them


def refused(status: int, body: object = None, **headers: str) -> UpstreamError:
    sent = json.dumps({"error": body}).encode()
    return refusal(status, sent, headers.get("retry_after", ""))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "upstream_rejected"),
        (401, "upstream_unauthorized"),
        (403, "upstream_unauthorized"),
        (404, "upstream_rejected"),
        (408, "upstream_failed"),
        (409, "upstream_failed"),
        (413, "upstream_rejected"),
        (422, "upstream_rejected"),
        (429, "upstream_rate_limited"),
        (500, "upstream_failed"),
        (503, "upstream_failed"),
        (302, "upstream_rejected"),
    ],
)
def test_a_refusal_has_the_code_of_its_status(status: int, code: str) -> None:
    """And says which it was; a rejection keeps a 4xx as its own."""
    error = refused(status, {"message": "no", "param": "model"})
    assert (error.code, error.upstream_status) == (code, status)
    if code == "upstream_rejected":
        assert (error.status, error.param) == (status if status >= 400 else 502, "model")
        assert error.message == "no"


def test_a_refused_key_is_not_told_to_clients() -> None:
    """OpenAI's message has a part of it."""
    error = refused(401, {"message": "Incorrect API key provided: sk-abcd"})
    assert "sk-" not in error.message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-1", 0.0),
        ("nan", 0.0),
        ("inf", 86400.0),
        ("1e9", 86400.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("", None),
    ],
)
def test_any_retry_after(header: str, seconds: float | None) -> None:
    """Seconds that a timer can wait for, or none."""
    assert refused(429, retry_after=header).retry_after == seconds
    assert refused(503, retry_after=header).retry_after == seconds


@pytest.mark.parametrize(
    "body",
    [
        {"message": "\ud800 broken \udfff", "param": "\ud800"},
        {"message": "x" * 100_000},
        {"message": {"not": ["a", "text"]}, "param": 5},
        {"message": None},
        "no object",
        ["neither"],
        None,
    ],
    ids=["surrogates", "long", "no text", "null", "text", "list", "nothing"],
)
def test_any_message(body: object) -> None:
    """What goes on to clients can be written, and is not long."""
    error = refused(400, body)
    assert error.message and len(error.message) <= 1000
    assert orjson.dumps(error.body("r"))
