"""Shapes in /openapi.json: what bodies are, and what comes back, in JSON Schema of 2020-12."""

from __future__ import annotations

from streaming.events import JSON


def ref(kind: str, name: str) -> JSON:
    return {"$ref": f"#/components/{kind}/{name}"}


def named(name: str) -> JSON:
    return ref("schemas", name)


def record(*required: str, **fields: JSON) -> JSON:
    return {"type": "object", "required": [*required], "properties": fields}


def either(*schemas: JSON) -> JSON:
    return {"anyOf": [*schemas]}


def listing(items: JSON, **more: object) -> JSON:
    return {"type": "array", "items": items, **more}


def text(most: int = 0, pattern: str = r"\S", **more: object) -> JSON:
    """Text that is not blank. most: characters; 0 is `limits.prompt_chars`."""
    length = {"maxLength": most} if most else {}
    return {"type": "string", "minLength": 1, **length, "pattern": pattern, **more}


def number(low: float, high: float, default: float | None = None, kind: str = "integer") -> JSON:
    more = {} if default is None else {"default": default}
    return {"type": kind, "minimum": low, "maximum": high, **more}


STRING: JSON = {"type": "string"}
FLAG: JSON = {"type": "boolean", "default": False}
COUNT: JSON = {"type": "integer", "minimum": 0}
ANY: JSON = {}
MAYBE: JSON = {"type": ["string", "null"]}
TIME: JSON = {"type": "string", "format": "date-time"}
MODEL = text(512, description="Else the default model; `demo:fail=midway` tries a failure.")
ROOM = text(128, r"^[^\s\x00-\x1f\x7f]+$")
CHANNEL = text(128, r"^[^\s:\x00-\x1f\x7f]+$")
POSITION = named("Position")
MESSAGES = named("Messages")
USER = text(128, r"^[^\x00-\x1f\x7f]+$")


def one_of(*values: str) -> JSON:
    return {"enum": [*values]}


# What is told of a generation, a room and a channel, each dialect in its own words.
USAGE = record(
    "prompt_tokens", "completion_tokens", prompt_tokens=COUNT, completion_tokens=COUNT,
    total_tokens=COUNT,
)  # fmt: skip
ERROR = record(
    "code", "message", code=STRING, message=STRING, param=STRING, request_id=STRING
)  # fmt: skip
CHOICE = record("index", "finish_reason", index=COUNT, delta={"type": "object"})
ANSWER = record("index", "message", index=COUNT, message={"type": "object"})


def _chunks(kind: str, choice: JSON) -> JSON:
    return record(
        "id", "object", "created", "model", "choices",
        id=STRING, object={"const": kind}, created=COUNT, model=STRING, choices=listing(choice),
        usage=USAGE,
    )  # fmt: skip


def _tool_frame(type: str, **fields: JSON) -> JSON:
    return record("type", *fields, type={"const": type}, **fields, id=POSITION)


_PROMPT = {"prompt": text(), "model": MODEL, "max_tokens": number(1, 10**7)}
_CONVERSATION = {
    "model": MODEL,
    "conversation_id": text(128, r"^[!-~]+$", description="Its last messages are the context."),
    "room": ROOM | {"description": "A shared room in which question and answer are told."},
}

_PARTS = listing({"type": "object"}, minItems=1)

SCHEMAS: dict[str, JSON] = {
    "Position": STRING | {"description": "A place in a stream, `<epoch>-<offset>`; sent as `id`."},
    "Error": record("error", error=ERROR | {"required": ["code", "message", "request_id"]}),
    "OpenAIError": record(
        "error",
        error=record(
            "message", "type", "param", "code",
            message=STRING, type=STRING, param=MAYBE, code=STRING,
            request_id=STRING,
        ),
    ),
    "Messages": listing(
        either(
            record("role", "content", role=text(), content=either(text(), _PARTS)),
            record("role", role=one_of("assistant", "tool", "function"), content=ANY),
        ),
        minItems=1,
    ),
    "Whole": record("text", "tokens", text=STRING, tokens=COUNT),
    "ContentFrame": either(
        record("content", content=STRING, id=POSITION),
        record("error", "code", error=STRING, code=STRING, id=POSITION),
    ),
    "ChatFrame": record(
        "type", "content", "conversation_id", "timestamp",
        type=one_of("start", "chunk", "end", "error"), content=STRING, conversation_id=STRING,
        stream_id=STRING, timestamp=TIME, metadata=record(usage=USAGE),
        contentType=one_of("text", "code", "table", "image"), data={"type": "object"}, id=POSITION,
    ),
    "ToolFrame": either(
        _tool_frame("content", content=STRING),
        _tool_frame("tool_call", tool=record("name", "arguments", name=STRING, arguments=STRING)),
        _tool_frame("done", usage=record(promptTokens=COUNT, completionTokens=COUNT)),
        _tool_frame("error", error=ERROR),
    ),
    "NativeFrame": record(
        "type", "time", "data", "id",
        type=one_of("started", "part_started", "delta", "part_finished", "finished", "failed",
                     "cancelled", "gap"),
        time=COUNT, data=record("stream_id", stream_id=STRING), id=POSITION,
    ),
    "OpenAIFrame": either(_chunks("chat.completion.chunk", CHOICE), named("OpenAIError")),
    "Completion": _chunks("chat.completion", ANSWER),
    "Heartbeat": record("timestamp", timestamp=either(COUNT, TIME), type=STRING),
    "CountFrame": record(
        "type", type=one_of("start", "data", "end"), content=STRING, timestamp=COUNT, id=POSITION
    ),
    "Message": record(
        "type", "id", "room", "userId", "timestamp",
        type=STRING, id=POSITION, room=STRING, userId=STRING, content=ANY, data=ANY, timestamp=TIME,
    ),
    "RoomFrame": record("type", type=STRING, room=STRING, id=POSITION) | {
        "description": "`joined` first, `gap` before it where a position could not be honoured; "
        "then `message` and what else is published, `user_joined`, `user_left`, `user_typing`, "
        "`presence`, `stream_start`, `stream_chunk`, `stream_end`, `stream_error`, "
        "`stream_cancelled`."
    },
    "ClientFrame": record(
        "type",
        type=one_of("authenticate", "join", "leave", "message", "send_message", "typing",
                     "user_typing", "generate", "stop", "history", "presence", "ping"),
        ref=ANY, room=ROOM, token=STRING, last_event_id=POSITION, content=STRING, data=ANY,
        idempotency_key=STRING, typing={"type": "boolean"}, message=STRING, messages=MESSAGES,
        model=MODEL, stream_id=STRING, before=POSITION, limit=COUNT,
    ),
    "ChannelEvent": {
        "type": "object",
        "description": "`connected` first; `event` is its name, in NDJSON `type`.",
    },
    "Status": record(
        "stream_id", "state", "position", "model", "started",
        stream_id=STRING, state=one_of("running", "finished", "failed", "cancelled"),
        position=POSITION, model=STRING, conversation_id=MAYBE,
        finish_reason=MAYBE, usage=either(USAGE, {"type": "null"}),
        error=either(ERROR, {"type": "null"}), started=TIME, finished=MAYBE,
    ),
    "Publication": record(
        type=text(64, r"^[A-Za-z0-9_.:-]+$", default="message"), content=text(), data=ANY
    ) | {"description": "One of type `message` has content; the server's own types are refused."},
    "Model": record("id", "object", id=STRING, object={"const": "model"}, owned_by=STRING),
    # What requests say.
    "Prompt": record("prompt", **_PROMPT),
    "PromptOrStream": record("prompt", **_PROMPT, stream=FLAG),
    "PromptOrMessages": either(
        record("prompt", **_PROMPT), record("messages", messages=MESSAGES, model=MODEL)
    ),
    "Chat": either(
        record("message", message=text(), **_CONVERSATION),
        record("messages", messages=MESSAGES, **_CONVERSATION),
    ),
    "OpenAI": record(
        "messages", messages=MESSAGES, model=MODEL, stream=FLAG, n=number(1, 128, 1),
        stream_options=record(include_usage=FLAG),
    ),
    "Publications": either(
        named("Publication"), listing(named("Publication"), minItems=1, maxItems=100)
    ),
    "Told": record(
        "user_id", "channel", "event",
        user_id=USER, channel=CHANNEL, event=text(64, r"^[A-Za-z0-9_.-]+$"), data=ANY,
    ),
    "TicketFor": record(path=text(2048, "^/")),
    "User": record("user", user=USER),
    # What they are answered, beside the above.
    "Published": either(record("id", id=POSITION), record("ids", ids=listing(POSITION))),
    "Page": record("messages", "next", messages=listing(named("Message")), next=MAYBE),
    "Rooms": record(
        "rooms",
        rooms=listing(record("room", "members", "position",
                             room=STRING, members=COUNT, position=POSITION)),
        incomplete={"const": True, "description": "An instance did not answer."},
    ),
    "Members": record("room", "members", room=STRING, members=listing(STRING)),
    "Deleted": record("deleted", deleted={"const": True}),
    "Delivered": record("delivered", delivered=COUNT),
    "Ticket": record("ticket", "expires_in", ticket=STRING, expires_in=COUNT),
    "Disconnected": record("disconnected", disconnected={"const": True}),
    "Models": record("object", "data", object={"const": "list"}, data=listing(named("Model"))),
    "Health": record("status", status={"const": "healthy"}),
    "Ready": record("status", status=STRING, also=listing(STRING)),
    "Beat": record("status", "timestamp", status={"const": "ok"}, timestamp=TIME),
    "Document": {"type": "object"},
}  # fmt: skip
