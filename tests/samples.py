"""Events for tests of dialects, framings and writers, as the log of one generation holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from streaming.dialects import DONE, Dialect
from streaming.events import Event, Position

STREAM = "stream_0123456789"
TIME = 1763719200000
STAMP = "2025-11-21T10:00:00.000Z"
ORIGIN = {
    "stream_id": STREAM,
    "conversation_id": "c1",
    "model": "m",
    "created": TIME,
}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
ERROR = {"code": "upstream_cut", "message": "the model's connection was cut", "request_id": "r1"}
CHUNK_HEAD = {
    "id": f"chatcmpl-{STREAM}",
    "object": "chat.completion.chunk",
    "created": TIME // 1000,
    "model": "m",
}


def event(type: str, offset: int = 1, **data: Any) -> Event:
    """An event of that log."""
    return Event(type, data, Position(STREAM, offset), TIME, ORIGIN)


def text(content: str, offset: int = 3, **data: Any) -> Event:
    """A delta of the answer's text."""
    return event("delta", offset, **{"part": 0, "kind": "text", **data, "content": content})


STARTED = event("started", 1, model="m")
PART_STARTED = event("part_started", 2, part=0, kind="text")
HELLO = text("Hello")
PART_FINISHED = event("part_finished", 4, part=0, kind="text")
FINISHED = event("finished", 5, finish_reason="stop", usage=USAGE, model="m")
FAILED = event("failed", 5, error=ERROR, status=502, usage=USAGE, model="m")
CANCELLED = event("cancelled", 5, reason="stopped", usage=USAGE, model="m")
ANSWER = [STARTED, PART_STARTED, HELLO, PART_FINISHED, FINISHED]

_TOOL = {"part": 1, "kind": "tool_call", "index": 0}
ARGUMENTS = '{"city": "Oslo"}'
TOOL_STARTED = event("part_started", 4, **_TOOL, id="call_1", name="get_weather")
TOOL_DELTA = event("delta", 5, **_TOOL, content='{"city":')
TOOL_FINISHED = event(
    "part_finished", 6, **_TOOL, id="call_1", name="get_weather", arguments=ARGUMENTS
)


REASONING = event("delta", 3, part=0, kind="reasoning", content="Hmm")
REFUSAL = event("delta", 3, part=0, kind="refusal", content="No")
SECOND = text("Hallo", choice=1)  # of the second answer, where two were asked for
LOGPROB = {"token": "Hi", "logprob": -0.5, "bytes": None, "top_logprobs": []}
WITH_LOGPROBS = text("Hi", extra={"logprobs": {"content": [LOGPROB], "refusal": None}})
WITH_EXTRA = text("Hi", extra={"hue": 1})
CODE = text("print()\n", kind="code", language="python")
TABLE = text("| a | b |\n|---|---|\n| 1 | x \\| y |\n", kind="table")
IMAGE = text("![a](http://x/y.png)", kind="image", image_url="http://x/y.png")
TOOLS = [TOOL_STARTED, TOOL_DELTA, TOOL_FINISHED]
EVERY = [
    *(STARTED, PART_STARTED, HELLO, CODE, TABLE, IMAGE, REASONING, REFUSAL, SECOND, WITH_LOGPROBS),
    *(WITH_EXTRA, *TOOLS, PART_FINISHED, FINISHED, FAILED, CANCELLED),
]


def said(dialect: Dialect, *events: Event) -> list[Mapping[str, Any] | str]:
    """What a dialect says of these events, with `[DONE]` as it is written."""
    objects: Iterable[Any] = (item for each in events for item in dialect.say(each) or ())
    return ["[DONE]" if item is DONE else item for item in objects]
