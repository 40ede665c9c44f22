"""The embedded demo model: answers without a key and without a network, and fails on request.

Its text depends on the model's name and on the last user message, on nothing else. The name `demo`
may carry knobs, `demo:key=value,key=value` (the last wins where one comes twice):

    rate       tokens a second, 50 unless told; 0 is as fast as allowed
    tokens     length of the text: it is cut, or begins again, to have exactly so many
    delay      seconds before the first token, or before a failure that comes instead of it
    jitter     0 to 1: how much of the interval before the next token varies
    reasoning  tokens of reasoning before the text
    tool       name of a tool to call after the text; 1 is the first of the request's `tools`, or
               get_weather; not where `messages` ends with a tool's result, or a client that
               answers tool calls would be asked for ever
    fail       before, or a status such as 429: instead of the first token
               midway, cut, stall: after half of the tokens (an error event, a cut, silence)

Knobs choose how it is said, and how much of it; the words are those of `demo`. Any other name is
answered as `demo` without knobs, in words of its own. A token is a word with the white space before
it, or a fragment of a tool call's arguments.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from random import Random
from typing import Any, NamedTuple

from streaming.errors import UpstreamError
from streaming.models import ModelCall, Piece

_BEFORE = {
    "before": "upstream_failed",
    "400": "upstream_rejected",
    "401": "upstream_unauthorized",
    "429": "upstream_rate_limited",
    "500": "upstream_failed",
    "503": "upstream_failed",
}
_MIDWAY = {"midway": "upstream_failed", "cut": "upstream_cut", "stall": ""}

_BLOCKS = {
    "code": "Here is some code:\n\n```python\ndef say(answer):\n    for word in answer.split():\n"
    '        print(word, end=" ", flush=True)\n```\n\n',
    "table": "Here is a table:\n\n| Format | Made for |\n| --- | --- |\n| SSE | browsers |\n"
    "| NDJSON | programs |\n| text | people |\n\n",
    # a data URL, so that it shows without a network
    "image": "Here is an image:\n\n![A rivulet](data:image/svg+xml,%3Csvg%20xmlns='http://www.w3.org/"
    "2000/svg'%20viewBox='0%200%2080%2040'%3E%3Cpath%20d='M0%2020q20-30%2040%200t40%200'%20"
    "fill='none'%20stroke='teal'%20stroke-width='4'/%3E%3C/svg%3E)\n\n",
}
_TIPS = (
    "Ask for code, a table or an image, and one will come by.",
    "The model name demo:rate=10,tokens=200 gives a slower and longer answer.",
    "The model name demo:fail=midway shows what a failure looks like.",
)
_THOUGHTS = (
    "The user has a question. Let me think about it, one word at a time. I know very little, "
    "but I can say so kindly, and I can say it in a steady stream."
)

# knob -> how its value is spelled, what it becomes, how to tell a person
_NUMBER = r"[0-9]{1,9}(\.[0-9]{1,9})?|\.[0-9]{1,9}"
_KNOBS: dict[str, tuple[str, type, str]] = {
    "rate": (_NUMBER, float, "a number"),
    "tokens": (r"[0-9]{1,9}", int, "a whole number"),
    "delay": (_NUMBER, float, "a number"),
    "jitter": (r"0?\.[0-9]{1,9}|[01](\.0)?", float, "a number from 0 to 1"),
    "reasoning": (r"[0-9]{1,9}", int, "a whole number"),
    "tool": (r"[A-Za-z0-9_-]{1,64}", str, "the name of a tool, or 1"),
    "fail": ("|".join([*_BEFORE, *_MIDWAY]), str, "one of " + ", ".join([*_BEFORE, *_MIDWAY])),
}


@dataclass(frozen=True, slots=True)
class _Knobs:
    rate: float = 50.0
    tokens: int | None = None  # as many as the answer has
    delay: float = 0.0
    jitter: float = 0.0
    reasoning: int = 0
    tool: str = ""
    fail: str = ""


class _Part(NamedTuple):
    """`length` tokens of one kind. `first`: the piece that begins it, still without its text."""

    first: Piece
    tokens: list[str]
    length: int


class DemoModel:
    """The demo model as a ModelSource.

    max_rate, max_tokens: what one stream may have. `rate` is lowered to max_rate without a word
    (rate 0 is max_rate); an answer of more than max_tokens, with its reasoning and tool call, is
    cut, finish reason `length`, as it is by the request's own `max_tokens`.
    """

    name = "demo"

    def __init__(self, max_rate: float = 1000.0, max_tokens: int = 20_000) -> None:
        self._max_rate = max_rate
        self._max_tokens = max_tokens

    async def stream(self, call: ModelCall) -> AsyncGenerator[list[Piece], None]:
        """The answer, token i at start + i / rate; a batch joins the tokens that are due.

        Raises UpstreamError: what `fail` asks for, or `upstream_rejected` before anything, naming
        the knob or the parameter that is wrong. Sleeps once a batch and can be cancelled there.
        """
        knobs = _read_knobs(call.model)
        name = "demo" if call.model.startswith("demo:") else call.model
        prompt = _last_user_text(call.messages)
        random = Random(f"{name}\n{prompt}".encode(errors="replace"))
        parts = _script(call, knobs, name, prompt, random)

        wanted = sum(part.length for part in parts)
        total = min(wanted, self._max_tokens, *_limits(call.params))
        end = (total + 1) // 2 if knobs.fail in _MIDWAY else total
        rate = min(knobs.rate or self._max_rate, self._max_rate)
        clock = asyncio.get_running_loop().time

        await asyncio.sleep(knobs.delay)
        if knobs.fail in _BEFORE:
            raise _failure(knobs.fail)
        start, said = clock(), 0
        for piece, tokens, length in parts:
            # The tokens, then again from a new paragraph, for ever.
            words = chain(tokens[:1], cycle([*tokens[1:], "\n\n" + tokens[0]]))
            until = min(said + length, end)
            while said < until:
                # Sleeps also where it is late, so that other tasks and a cancellation get a turn.
                next_due = start + (said + knobs.jitter * random.random()) / rate
                await asyncio.sleep(next_due - clock())
                due = int((clock() - start) * rate) + 1 - said
                due = min(max(due, 1), until - said)  # a timer may fire a little early
                yield [piece._replace(text="".join(islice(words, due)))]
                piece = Piece(piece.kind)
                said += due
        if knobs.fail == "stall":
            await asyncio.Event().wait()
        if knobs.fail:
            raise _failure(knobs.fail)

        reason = "tool_calls" if parts[-1].first.kind == "tool_call" else "stop"
        asked = len(prompt.split())
        usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
        reason = "length" if wanted > total else reason
        yield [Piece("finish", reason), Piece("usage", extra=usage)]

    async def close(self) -> None:
        """Nothing to give back: a stream is only the task that reads it."""


def _rejected(message: str, param: str) -> UpstreamError:
    return UpstreamError("upstream_rejected", f"demo model: {message}", param=param)


def _failure(fail: str) -> UpstreamError:
    code = (_BEFORE | _MIDWAY)[fail]
    status = int(fail) if fail.isdigit() else None
    return UpstreamError(
        code,
        f"the demo model fails as it was told to: fail={fail}",
        status=status if code == "upstream_rejected" else None,
        retry_after=1.0 if code == "upstream_rate_limited" else None,
        upstream_status=status,
    )


def _read_knobs(model: str) -> _Knobs:
    values: dict[str, Any] = {}
    for knob in model.removeprefix("demo:").split(",") if model.startswith("demo:") else ():
        key, _, value = (word.strip() for word in knob.partition("="))
        if key not in _KNOBS:
            raise _rejected(f"unknown knob {key!r}; there are {', '.join(_KNOBS)}", "model")
        spelling, kind, words = _KNOBS[key]
        if not re.fullmatch(spelling, value):
            raise _rejected(f"knob {key} must be {words}", "model")
        values[key] = kind(value)
    return _Knobs(**values)


def _limits(params: Mapping[str, Any]) -> Iterator[int]:
    for key in ("max_tokens", "max_completion_tokens"):
        value = params.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _rejected(f"{key} must be a whole number above 0", key)
        yield value


def _last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user message, of all its text parts; "" where there is none."""
    content = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), "")
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    texts = [_get(part, "text") for part in content if _get(part, "type") == "text"]
    return "\n".join(text for text in texts if isinstance(text, str))


def _get(value: Any, key: str) -> Any:
    """A field of what a client sent, None where it sent something else."""
    return value.get(key) if isinstance(value, Mapping) else None


def _script(call: ModelCall, knobs: _Knobs, name: str, prompt: str, random: Random) -> list[_Part]:
    """What the model is going to say: reasoning, text, tool call."""
    text = _split(_answer(name, prompt, random))
    parts = [
        _Part(Piece("reasoning"), _split(_THOUGHTS), knobs.reasoning),
        _Part(Piece("text"), text, len(text) if knobs.tokens is None else knobs.tokens),
    ]
    if knobs.tool and not (call.messages and call.messages[-1].get("role") == "tool"):
        tool, arguments = _tool_call(knobs.tool, call.params.get("tools"), prompt)
        fragments = _split(arguments)
        first = Piece("tool_call", id=f"call_{random.getrandbits(64):016x}", name=tool)
        parts.append(_Part(first, fragments, len(fragments)))
    return parts


def _answer(name: str, prompt: str, random: Random) -> str:
    who = "" if name == "demo" else f", standing in for {_excerpt(name, 40)}"
    what = f"You asked: “{_excerpt(prompt, 60)}”" if prompt.strip() else "You asked nothing."
    wishes = {word.lower() for word in re.findall(r"\b(?i:code|table|image)\b", prompt)}
    blocks = "".join(block for word, block in _BLOCKS.items() if word in wishes)
    return (
        f"Hello! I am the demo model{who}, and I answer word by word. {what}\n\n"
        "A real model would know more about that, but all the rest is real: when the connection "
        "breaks, this answer can be resumed where it stopped, on any transport, and anybody who "
        f"may read it can stop it. {random.choice(_TIPS)}\n\n{blocks}"
        "For answers by a real model, set base_url under [model] in config.toml and put its key "
        "into OPENAI_API_KEY."
    )


def _tool_call(wanted: str, tools: Any, prompt: str) -> tuple[str, str]:
    """The tool's name and its arguments: each field that its schema names holds the prompt."""
    functions = [_get(tool, "function") for tool in tools] if isinstance(tools, list) else []
    known = {name: f for f in functions if isinstance(name := _get(f, "name"), str)}
    name = next(iter(known), "get_weather") if wanted == "1" else wanted
    fields = _get(_get(known.get(name), "parameters"), "properties")
    said = _excerpt(prompt, 60)
    arguments = dict.fromkeys(fields if isinstance(fields, Mapping) else ["city"], said)
    return name, json.dumps(arguments, ensure_ascii=False)


def _excerpt(text: str, limit: int) -> str:
    """One line of at most `limit` characters, and of nothing that could not be encoded again."""
    line = " ".join(text[: 4 * limit].encode(errors="replace").decode().split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _split(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)
