"""OpenAI's chat completion API: any client of theirs works against this server.

Source: the API reference of OpenAI, chat completions and models. The request's unknown fields pass
to the upstream untouched.
"""

from __future__ import annotations

from aiohttp import web

from handlers.answers import admit, choose_encoder, resume, stream, whole
from handlers.chat import Question, start
from handlers.keys import CONFIG, GENERATIONS
from handlers.middleware import json_response
from handlers.reading import Fields, read_fields
from streaming.dialects import OPENAI, OPENAI_WITH_USAGE, completion
from streaming.encoders import SSE
from streaming.errors import InvalidField, NotFound
from streaming.events import JSON

# Seconds: a client of this API cannot come back to an answer, so nobody reading is the end of it.
LINGER = 0.0
_OURS = frozenset({"model", "messages", "stream"})


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """POST /v1/chat/completions"""
    resumed = await resume(request, OPENAI_WITH_USAGE, SSE)
    if resumed is not None:
        return resumed
    body = await read_fields(request)
    question = _question(body, Fields(body, request.app[CONFIG].limits))
    if not question.streamed:
        generation = await start(request, question, body, LINGER)
        return await whole(request, generation, lambda g: completion(g.log.read(0)))
    options = body.get("stream_options") or {}
    dialect = OPENAI_WITH_USAGE if options.get("include_usage") else OPENAI
    encoder = choose_encoder(request, dialect, SSE)
    with await admit(request):
        generation = await start(request, question, body, LINGER)
        del question, body, options  # not to be kept as long as the stream
        return await stream(request, generation, encoder)


def _question(body: JSON, fields: Fields) -> Question:
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InvalidField("stream_options", "must be an object")
    params = {name: value for name, value in body.items() if name not in _OURS}
    if "n" in params:
        params["n"] = fields.integer("n", 1, 1, 128)
    return Question(
        messages=fields.messages(),
        model=fields.model(),
        params=params,
        streamed=fields.flag("stream"),
    )


async def models(request: web.Request) -> web.Response:
    """GET /v1/models"""
    names = request.app[GENERATIONS].models.names
    return json_response({"object": "list", "data": [_model(name) for name in names]})


async def model(request: web.Request) -> web.Response:
    """GET /v1/models/{model}"""
    name = request.match_info["model"]
    if name not in request.app[GENERATIONS].models.names:
        raise NotFound(f"no model {name!r} is listed here", code="model_not_found", param="model")
    return json_response(_model(name))


def _model(name: str) -> JSON:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rivulet"}


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.post("/v1/chat/completions", chat_completions),
        web.get("/v1/models", models, allow_head=False),
        web.get("/v1/models/{model:.+}", model, allow_head=False),
    ]
