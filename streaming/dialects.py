"""Vocabularies: what each kind of client calls the events of a generation's log.

A dialect turns one event into the objects its clients expect, in order. It is a pure function: what
it would have to remember is in the event already. `None` is an event its clients never hear of; an
empty list is one that they only take the position of.

The wire forms are those of OpenAI's chat completion API (`openai`) and of clients that exist.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from streaming.events import JSON, Event
from streaming.markup import table_rows

DONE: JSON = {}  # stands for the `[DONE]` that ends a stream of events; compared by identity

ENDINGS = frozenset({"finished", "failed", "cancelled"})
TEXT_KINDS = frozenset({"text", "code", "table", "image"})  # the answer, as opposed to thoughts


def is_text(event: Event) -> bool:
    """Whether this event is a delta of the answer itself (the first, where several were asked)."""
    data = event.data
    return event.type == "delta" and data["kind"] in TEXT_KINDS and not data.get("choice")


def timestamp(ms: int) -> str:
    """RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _content(event: Event) -> list[JSON] | None:
    match event.type:
        case "delta" if is_text(event):
            return [{"content": event.data["content"]}]
        case "started":
            return []
        case "finished":
            return [DONE]
        case "failed":
            error = event.data["error"]
            return [{"error": error["message"], "code": error["code"]}]
        case "cancelled":
            return [{"error": "Stopped", "code": "cancelled"}]
    return None


def _chat(event: Event) -> list[JSON] | None:
    origin, data = event.origin, event.data

    def say(type: str, content: str = "", **fields: Any) -> list[JSON]:
        stamp = timestamp(event.time)
        conversation = origin["conversation_id"]
        return [
            {"type": type, "content": content, "conversation_id": conversation}
            | ({"stream_id": origin["stream_id"]} if type == "start" else {})
            | {"timestamp": stamp, **fields}
        ]

    match event.type:
        case "started":
            return say("start")
        case "delta" if is_text(event):
            fields: JSON = {"metadata": {"model": origin["model"]}}
            match data["kind"]:
                case "code":
                    fields |= {"contentType": "code", "data": {"language": data["language"]}}
                case "table":
                    rows = table_rows(data["content"])
                    fields |= {"contentType": "table", "data": {"tableData": rows}}
                case "image":
                    fields |= {"contentType": "image", "data": {"imageUrl": data["image_url"]}}
            return say("chunk", data["content"], **fields)
        case "finished" | "cancelled":
            reason = data.get("finish_reason", "cancelled")
            metadata = {"model": origin["model"], "finish_reason": reason, "usage": data["usage"]}
            return say("end", metadata=metadata)
        case "failed":
            error = data["error"]
            return say("error", error["message"], metadata={"code": error["code"]})
    return None


def _tool(event: Event) -> list[JSON] | None:
    data = event.data
    match event.type:
        case "delta" if is_text(event):
            return [{"type": "content", "content": data["content"]}]
        case "part_finished" if data["kind"] == "tool_call":
            call = {"name": data["name"], "arguments": data["arguments"]}
            return [{"type": "tool_call", "tool": call}]
        case "finished":
            usage = data["usage"]
            counts = {
                "promptTokens": usage["prompt_tokens"],
                "completionTokens": usage["completion_tokens"],
            }
            return [{"type": "done", "usage": counts}, DONE]
        case "failed":
            return [{"type": "error", "error": data["error"]}, DONE]
        case "cancelled":
            error = {"code": "cancelled", "message": "Stopped"}
            return [{"type": "error", "error": error}, DONE]
    return None


def _native(event: Event) -> list[JSON] | None:
    data = {"stream_id": event.origin["stream_id"], **event.data}
    return [{"type": event.type, "time": event.time, "data": data}]


_OPENAI_FIELDS = {"reasoning": "reasoning_content", "refusal": "refusal"}


def _openai(event: Event) -> list[JSON] | None:
    data = event.data

    def chunk(delta: JSON, choice: int = 0, finish: str | None = None, **fields: Any) -> JSON:
        fields = {"index": choice, "delta": delta, **fields, "finish_reason": finish}
        return openai_object(event, "chat.completion.chunk", [fields])

    match event.type:
        case "started":
            return [chunk({"role": "assistant", "content": ""})]
        case "part_started" if data["kind"] == "tool_call":
            function = {"name": data["name"], "arguments": ""}
            call = {"index": data["index"], "id": data["id"], "type": "function"}
            return [chunk({"tool_calls": [call | {"function": function}]}, data.get("choice", 0))]
        case "delta":
            choice, text = data.get("choice", 0), data["content"]
            extra = dict(data.get("extra", ()))
            fields = {"logprobs": extra.pop("logprobs")} if "logprobs" in extra else {}
            if data["kind"] == "tool_call":
                call = {"index": data["index"], "function": {"arguments": text}}
                return [chunk({"tool_calls": [call]}, choice)]
            name = _OPENAI_FIELDS.get(data["kind"], "content")
            return [chunk({name: text, **extra}, choice, **fields)]
        case "finished":
            reasons = data.get("finish_reasons") or {"0": data["finish_reason"]}
            usage = openai_object(event, "chat.completion.chunk", [])
            usage["usage"] = data["usage"]
            return [chunk({}, int(c), reason) for c, reason in reasons.items()] + [usage, DONE]
        case "failed":
            status = data.get("upstream_status") or data["status"]
            return [{"error": openai_error(data["error"], status)}]
        case "cancelled":
            return [{"error": openai_error({"code": "cancelled", "message": "Stopped"})}]
    return None


def openai_object(event: Event, kind: str, choices: list[JSON]) -> JSON:
    """The envelope that OpenAI puts around chunks and whole answers."""
    origin = event.origin
    return {
        "id": f"chatcmpl-{origin['stream_id']}",
        "object": kind,
        "created": origin["created"] // 1000,
        "model": origin["model"],
        "choices": choices,
    }


def completion(events: Iterable[Event]) -> JSON:
    """A finished generation's events as one `chat.completion`."""
    choices: defaultdict[int, JSON] = defaultdict(
        lambda: {"message": {"role": "assistant", "content": None}, "logprobs": None}
    )
    whole: JSON = {}
    for event in events:
        data = event.data
        choice = choices[data.get("choice", 0)]
        message = choice["message"]
        if event.type == "delta" and data["kind"] != "tool_call":
            name = _OPENAI_FIELDS.get(data["kind"], "content")
            message[name] = (message.get(name) or "") + data["content"]
            extra = dict(data.get("extra", ()))
            if logprobs := extra.pop("logprobs", None):
                choice["logprobs"] = choice["logprobs"] or {}
                _add_logprobs(choice["logprobs"], logprobs)
            message.update(extra)
        elif event.type == "part_finished" and data["kind"] == "tool_call":
            function = {"name": data["name"], "arguments": data["arguments"]}
            call = {"id": data["id"], "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif event.type == "finished":
            reasons = data.get("finish_reasons") or {"0": data["finish_reason"]}
            for index, reason in reasons.items():
                choices[int(index)]["finish_reason"] = reason
            answers = [{"index": index, **choices[index]} for index in sorted(choices)]
            whole = openai_object(event, "chat.completion", answers) | {"usage": data["usage"]}
    return whole


def _add_logprobs(known: JSON, more: JSON) -> None:
    for kind, tokens in more.items():
        if isinstance(known.get(kind), list) and isinstance(tokens, list):
            known[kind] += tokens
        elif known.get(kind) is None:
            known[kind] = list(tokens) if isinstance(tokens, list) else tokens


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


def openai_error(error: JSON, status: int = 0) -> JSON:
    """OpenAI's fields around our error object."""
    type = _OPENAI_TYPES.get(
        status, "invalid_request_error" if 400 <= status < 500 else "server_error"
    )
    return {
        "message": error["message"],
        "type": type,
        "param": error.get("param"),
        "code": error["code"],
        "request_id": error.get("request_id", ""),
    }


def without_usage(event: Event) -> list[JSON] | None:
    """*openai* for a client that did not ask for usage (`stream_options.include_usage`)."""
    objects = _openai(event)
    if event.type == "finished" and objects:
        del objects[-2]
    return objects


@dataclass(frozen=True, slots=True)
class Dialect:
    """One vocabulary and the habits of its clients.

    ids: where SSE says the position: before the data in the event's block, in a block of its own
    after it, before the data where the object has an id of its own, or nowhere. merge: adjacent
    deltas may go out as one. holds: the status waits for the first upstream delta or failure. cuts:
    after a failure the connection is cut, not ended.
    named: SSE says as `event:` the object's type, or the event's. done: `[DONE]` ends it. dated:
    heartbeats say the time in RFC 3339, not in milliseconds.
    """

    name: str
    say: Callable[[Event], list[JSON] | None]
    ids: Literal["before", "after", "own", "none"]
    merge: bool = True
    holds: bool = False
    cuts: bool = False
    named: Literal["", "object", "event"] = ""
    done: bool = True
    dated: bool = False


CONTENT = Dialect("content", _content, ids="after")
CONTENT_WITHOUT_DONE = Dialect("content", _content, ids="after", done=False)
CHAT = Dialect("chat", _chat, ids="before")
TOOL = Dialect("tool", _tool, ids="before")
NATIVE = Dialect("native", _native, ids="before", named="object")
OPENAI = Dialect("openai", without_usage, ids="none", holds=True, cuts=True)
OPENAI_WITH_USAGE = Dialect("openai", _openai, ids="none", holds=True, cuts=True)

DIALECTS = {d.name: d for d in (CONTENT, CHAT, TOOL, NATIVE, OPENAI_WITH_USAGE)}
