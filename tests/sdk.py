"""The stock `openai` package for Python, as the tests call it."""

from __future__ import annotations

from typing import Any

import openai
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from tests.processes import Server

PROMPT = "what is a river?"
ASKED: list[ChatCompletionMessageParam] = [{"role": "user", "content": PROMPT}]
Client = openai.AsyncOpenAI


def client_of(server: Server) -> Client:
    """The SDK before this server. Its own retries are off, so that one call is one request."""
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-client", max_retries=0)


async def stream(client: Client, model: str, **more: Any) -> list[ChatCompletionChunk]:
    """All chunks of a streamed answer."""
    got: list[ChatCompletionChunk] = []
    await read_into(got, client, model, **more)
    return got


async def read_into(
    got: list[ChatCompletionChunk], client: Client, model: str, **more: Any
) -> None:
    """As `stream`; what has come is in `got` when it raises."""
    create: Any = client.chat.completions.create
    async for chunk in await create(model=model, messages=ASKED, stream=True, **more):
        got.append(chunk)  # noqa: PERF401 - an error leaves what has come


async def whole(client: Client, model: str, **more: Any) -> Any:
    """An answer in one piece."""
    create: Any = client.chat.completions.create
    return await create(model=model, messages=ASKED, **more)


def said(chunks: list[ChatCompletionChunk], field: str = "content", choice: int = 0) -> str:
    """The text that one choice's deltas make."""
    deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == choice]
    return "".join(getattr(delta, field, None) or "" for delta in deltas)


def reasons(chunks: list[ChatCompletionChunk]) -> list[tuple[int, str]]:
    """The finish reasons that came, each with its choice."""
    choices = [c for chunk in chunks for c in chunk.choices]
    return [(c.index, c.finish_reason) for c in choices if c.finish_reason]
