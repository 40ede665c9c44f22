"""The conversation and generation endpoints: each a row of path, how the request is read, dialect.

The table is at the end of the file.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote

import orjson
from aiohttp import web

from handlers.answers import admit, choose_encoder, resume, stream, whole
from handlers.identity import check_room
from handlers.keys import CONFIG, GENERATIONS, IDENTITY, LIMITS, REQUEST_ID, ROOMS, STATE, USER
from handlers.middleware import note
from handlers.reading import NAME_CHARS, Fields, idempotency_key, path_of, read_fields
from streaming.auth import Identity
from streaming.dialects import CHAT, CONTENT, CONTENT_WITHOUT_DONE, TOOL, Dialect
from streaming.encoders import NDJSON, NDJSON_BRACES, SSE, Framing
from streaming.errors import InvalidField, Unavailable
from streaming.events import JSON
from streaming.generation import Ask, Generation, Key
from streaming.grants import PERSONAL
from streaming.models import ModelCall
from streaming.room import Room

DEFAULT_PROMPT = "Say hello, and tell me in a few sentences what a streaming server does."
_CONVERSATION = re.compile(r"[!-~]{1,128}")  # it goes into a header


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks. message: to be said in the conversation, whose last messages are then
    the context; else `messages` are. room: a shared room to say it in instead. dialect: where the
    body decides it.
    """

    messages: list[JSON] = field(default_factory=list)
    message: str = ""
    model: str = ""
    params: JSON = field(default_factory=dict)
    conversation_id: str = ""
    room: str = ""
    streamed: bool = False
    dialect: Dialect | None = None


def _prompt(fields: Fields) -> Question:
    limit = fields.integer("max_tokens", 0, 1, 10**7)
    return Question(
        messages=[{"role": "user", "content": fields.text("prompt")}],
        model=fields.model(),
        params={"max_tokens": limit} if limit else {},
        streamed=fields.flag("stream"),
    )


def _prompt_query(fields: Fields) -> Question:
    prompt = fields.text("prompt", DEFAULT_PROMPT)
    return Question(messages=[{"role": "user", "content": prompt}], model=fields.model())


def _required_prompt_query(fields: Fields) -> Question:
    fields.text("prompt")
    return _prompt_query(fields)


def _prompt_or_messages(fields: Fields) -> Question:
    if fields.data.get("messages") is None:
        return _prompt(fields)
    return Question(messages=fields.messages(), model=fields.model())


def _message_or_messages(fields: Fields) -> Question:
    conversation_id = fields.text("conversation_id", "", most=NAME_CHARS)
    if conversation_id and not _CONVERSATION.fullmatch(conversation_id):
        raise InvalidField("conversation_id", "must be 1 to 128 visible ASCII characters")
    room, model = fields.text("room", "", most=NAME_CHARS), fields.model()
    if room.startswith(PERSONAL):
        raise InvalidField("room", "must not begin with conv: or user:")
    if fields.data.get("message") is None and fields.data.get("messages") is not None:
        return Question(fields.messages(), "", model, {}, conversation_id, room, dialect=TOOL)
    conversation_id = conversation_id or f"c{secrets.token_hex(8)}"
    return Question([], fields.text("message"), model, {}, conversation_id, room)


@dataclass(frozen=True, slots=True)
class Row:
    """One endpoint. reads: the fields of its body, or of its query for a GET. streams: always,
    where the body says `stream: true`, or never. also: a dialect that its body may ask for.
    """

    method: str
    path: str
    reads: Callable[[Fields], Question]
    dialect: Dialect
    framing: Framing = SSE
    streams: str = "always"
    also: Dialect | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Resumes where the request carries a position, else starts a generation and answers."""
        resumed = await resume(request, self.dialect, self.framing, self.also)
        if resumed is not None:
            return resumed
        data = await read_fields(request)
        question = self.reads(Fields(data, request.app[CONFIG].limits))
        if self.streams == "never" or (self.streams == "asked" and not question.streamed):
            generation = await start(request, question, data)
            return await whole(request, generation, _text_and_tokens)
        encoder = choose_encoder(request, question.dialect or self.dialect, self.framing)
        with await admit(request):
            generation = await start(request, question, data)
            del question, data  # not to be kept as long as the stream
            return await stream(request, generation, encoder)


async def start(
    request: web.Request, question: Question, body: JSON, linger: float | None = None
) -> Generation:
    """Starts what is asked, or finds what the same idempotency key has started. A client that goes
    meanwhile changes nothing.
    """
    key = _key(request, body)
    if (found := await request.app[GENERATIONS].started(key)) is not None:
        return found
    note(request, await request.app[LIMITS].take("generations", request[USER]))
    return await begin(request.app, request[IDENTITY], request[REQUEST_ID], question, key, linger)


async def begin(
    app: web.Application,
    who: Identity,
    request_id: str,
    question: Question,
    key: Key | None = None,
    linger: float | None = None,
) -> Generation:
    """As `start`, where there is no request of its own: a frame on a socket asks."""
    cfg = app[CONFIG].generation
    if app[STATE].draining:
        raise Unavailable("this server is going away", code="draining", retry_after=1)
    room, messages = None, question.messages
    if question.room or question.conversation_id:
        room = await app[ROOMS].open(_room_name(who, question))
        await room.keeper.settle(room)  # an answer that a client has seen the end of is context
        messages = _context(room, question, who)
    last = messages[-1]
    ask = Ask(
        ModelCall(question.model, messages, question.params),
        owner=who.user,
        linger=cfg.linger if linger is None else linger,
        conversation_id=question.conversation_id,
        room=room,
        said=last["content"] if last["role"] == "user" else None,
        dialect=question.dialect,
        key=key,
        request_id=request_id,
    )
    return await app[GENERATIONS].start(ask)


def _room_name(who: Identity, question: Question) -> str:
    """Raises Forbidden."""
    if question.room:
        return check_room(question.room, who, "generate")
    # Percent-encoded, so that no owner and id read like another's.
    owner, conversation = quote(who.user, safe=""), quote(question.conversation_id, safe="")
    return f"conv:{owner}:{conversation}"


def _context(room: Room, question: Question, who: Identity) -> list[JSON]:
    """What the model is told: the conversation's last messages, or the client's own."""
    if not question.message:
        return question.messages
    said = {"role": "user", "content": question.message}
    if not who.may("subscribe", room.name):
        return [said]  # it could be asked for what they may not read
    return [*room.context(), said][-(room.messages.maxlen or 1) :]


def _key(request: web.Request, body: JSON) -> Key | None:
    """The request's idempotency key, or with single flight one made from user and body."""
    given = idempotency_key(request)
    flight = not given and request.app[CONFIG].generation.single_flight
    if not given and not flight:
        return None
    digest = hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).digest()
    scope = f"{request.method} {path_of(request)} {request[USER]}"
    return Key(scope, f"key {given}" if given else digest.hex(), digest, flight)


def _text_and_tokens(generation: Generation) -> JSON:
    assert generation.ending is not None
    return {
        "text": generation.text(),
        "tokens": generation.ending.data["usage"]["completion_tokens"],
    }


ROWS = (
    Row("POST", "/api/v1/generate", _prompt, CONTENT, streams="never"),
    Row("POST", "/api/v1/ai/generate", _prompt, CONTENT, streams="asked"),
    Row("POST", "/api/v1/ai/generate/stream", _prompt, CONTENT),
    Row("GET", "/stream", _prompt_query, CONTENT_WITHOUT_DONE, NDJSON),
    Row("POST", "/stream", _prompt_or_messages, CONTENT),
    Row("GET", "/chat", _required_prompt_query, CONTENT, NDJSON_BRACES),
    Row("POST", "/api/chat/stream", _message_or_messages, CHAT, also=TOOL),
)


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.post(row.path, row.handle)
        if row.method == "POST"
        else web.get(row.path, row.handle, allow_head=False)
        for row in ROWS
    ]
