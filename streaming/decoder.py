"""The decoder: bytes of a streamed chat completion to pieces.

Written against OpenAI's API reference (the streamed `chat.completion.chunk`) and the event streams
of the HTML standard (section 9.2), and lenient where upstreams are known to differ.
"""

from __future__ import annotations

from typing import Any

import orjson

from streaming.errors import UpstreamError
from streaming.events import JSON
from streaming.models import Piece

EVENT_BYTES = 32 << 20  # an unfinished line or event past this is an attack or a broken upstream
MESSAGE_CHARS = 1000  # of an upstream's error message that go on to the client


class ChunkDecoder:
    """Bytes of a streamed chat completion to pieces, whatever the boundaries between reads.

    A line ends with LF or CRLF; only `data:` and `event: error` mean something. `done`: `[DONE]`
    has come. `finished`: a finish reason has. `failure`: what went wrong, after the pieces before.
    """

    def __init__(self) -> None:
        self.done = self.finished = False
        self.failure: UpstreamError | None = None
        self._unfinished = bytearray()  # a line that has not ended
        self._pending = bytearray()  # data lines of an event that has several
        self._error_event = False

    def feed(self, data: bytes) -> list[Piece]:
        """The pieces that these bytes complete. Never raises; see `failure`."""
        if b"\n" not in data:
            self._unfinished += data
            if len(self._unfinished) > EVENT_BYTES:
                self.failure = UpstreamError("upstream_invalid", "the model sent an endless line")
            return []
        lines = data.split(b"\n")
        if self._unfinished:
            lines[0] = bytes(self._unfinished) + lines[0]
        self._unfinished = bytearray(lines.pop())
        return self._decode(lines)

    def eof(self) -> list[Piece]:
        """The pieces of a last line that did not end."""
        return self._decode([bytes(self._unfinished), b""])

    def _decode(self, lines: list[bytes]) -> list[Piece]:
        pieces: list[Piece] = []
        text: list[str] = []  # adjacent plain text, the common case, joined once
        try:
            for line in lines:
                if line[:5] == b"data:":
                    payload = line[5:].strip()
                    if payload == b"[DONE]":
                        self.done = True
                        break
                    if self._pending:
                        self._hold(payload)
                        continue
                    try:
                        chunk = orjson.loads(payload)
                    except orjson.JSONDecodeError:
                        self._hold(payload)
                        continue
                elif not line or line == b"\r":
                    if not self._pending:
                        self._error_event = False
                        continue
                    chunk = orjson.loads(self._pending)
                    self._pending.clear()
                else:
                    if line[:6] == b"event:":
                        self._error_event = line[6:].strip() == b"error"
                    continue
                content = None if self._error_event else _plain(chunk)
                if content is not None:
                    text.append(content)
                    continue
                if text:
                    pieces.append(Piece("text", "".join(text)))
                    text.clear()
                self._chunk(chunk, pieces)
        except UpstreamError as failure:
            self.failure = failure
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            self.failure = UpstreamError("upstream_invalid", "the model sent what is no chunk")
        if text:
            pieces.append(Piece("text", "".join(text)))
        return pieces

    def _hold(self, payload: bytes) -> None:
        # It is parsed once, at the event's end: line by line would take the square of its length.
        if payload:
            self._pending += payload + b"\n"
        if len(self._pending) > EVENT_BYTES:
            raise ValueError("an endless event")

    def _chunk(self, chunk: JSON, pieces: list[Piece]) -> None:
        error = chunk.get("error")
        if error or self._error_event:
            raise _error_event(error or chunk)
        for choice in chunk.get("choices") or ():
            index = _index(choice.get("index"), 0)
            delta = dict(choice.get("delta") or choice.get("message") or ())
            for name in ("role", "logprobs"):
                delta.pop(name, None)
            thoughts = delta.pop("reasoning_content", None), delta.pop("reasoning", None)
            if thought := thoughts[0] or thoughts[1]:
                pieces.append(Piece("reasoning", _string(thought), index))
            if refusal := delta.pop("refusal", None):
                pieces.append(Piece("refusal", _string(refusal), index))
            content = delta.pop("content", None) or ""
            if not isinstance(content, str):  # a list of parts, as some upstreams send
                content = "".join(part.get("text") or "" for part in content)
            calls = delta.pop("tool_calls", None) or ()
            extra = {name: value for name, value in delta.items() if value is not None}
            logprobs = choice.get("logprobs")
            if logprobs and isinstance(logprobs, dict):
                extra["logprobs"] = logprobs
            if content or extra:
                pieces.append(Piece("text", content, index, extra=_sayable(extra) or None))
            for place, call in enumerate(calls):
                pieces.append(_tool_call(call, place, index))
            if reason := choice.get("finish_reason"):
                self.finished = True
                pieces.append(Piece("finish", str(reason), index))
        if usage := chunk.get("usage"):
            pieces.append(Piece("usage", extra=_sayable(dict(usage))))


def _plain(chunk: Any) -> str | None:
    """The text of a chunk that is nothing but text of the first choice, as nearly all are."""
    try:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        content = delta["content"]
    except (KeyError, TypeError, ValueError):
        return None
    if (
        len(delta) > 1
        or type(content) is not str
        or not content
        or choice.get("finish_reason")
        or choice.get("index")
        or choice.get("logprobs")
        or chunk.get("usage")
        or chunk.get("error")
    ):
        return None
    return content


def _tool_call(call: JSON, place: int, choice: int) -> Piece:
    function = call.get("function") or {}
    arguments = function.get("arguments") or ""
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    return Piece(
        "tool_call",
        arguments,
        choice,
        place=_index(call.get("index"), place),
        id=str(call.get("id") or ""),
        name=_string(function.get("name") or ""),
    )


# What an upstream sends goes on to every reader, so it must be what it should be. All raise
# TypeError or ValueError.


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _index(value: Any, default: int) -> int:
    index = default if value is None else int(value)
    if not 0 <= index < 1 << 31:
        raise ValueError(index)
    return index


def _sayable(value: JSON) -> JSON:
    # orjson writes nothing as deep as it reads; eight levels are for what a dialect puts around it.
    if value:
        orjson.dumps([[[[[[[[value]]]]]]]])
    return value


def _error_event(error: Any) -> UpstreamError:
    message, code = error, ""
    if isinstance(error, dict):
        message = error.get("message") or error
        code = f"{error.get('code')} {error.get('type')}"
    limited = "429" in code or "rate_limit" in code
    name = "upstream_rate_limited" if limited else "upstream_failed"
    return UpstreamError(name, shown(message))


def shown(message: Any) -> str:
    """An upstream's message as far as it is passed on; lone surrogates, which the SDK reads and no
    encoder could write, are replaced.
    """
    return str(message)[:MESSAGE_CHARS].encode(errors="replace").decode()
