"""The usual way: FastAPI, the `openai` package's typed stream, one SSE event a chunk.

Written as one would write it for production: one client for the process, uvicorn without an access
log, on uvloop and httptools where they are installed.
"""

import argparse
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI, OpenAIError
from pydantic import BaseModel

from bench.upstream import listening


class Prompt(BaseModel):
    prompt: str
    model: str
    stream: bool = True


class State(TypedDict):
    client: AsyncOpenAI


async def answer(client: AsyncOpenAI, asked: Prompt) -> AsyncIterator[str]:
    """The model's answer as SSE: one event for each chunk that has text, then [DONE]."""
    try:
        stream = await client.chat.completions.create(
            model=asked.model, messages=[{"role": "user", "content": asked.prompt}], stream=True
        )
        async with stream:
            async for chunk in stream:
                if chunk.choices and (content := chunk.choices[0].delta.content):
                    yield f"data: {json.dumps({'content': content})}\n\n"
        yield "data: [DONE]\n\n"
    except OpenAIError as error:
        yield f"data: {json.dumps({'error': str(error)})}\n\n"


def build(upstream: str) -> FastAPI:
    """The application, in front of the upstream at this base URL."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        async with AsyncOpenAI(base_url=upstream, api_key="x") as client:
            yield {"client": client}

    app = FastAPI(lifespan=lifespan)

    @app.post("/api/v1/ai/generate/stream")
    async def generate(asked: Prompt, request: Request) -> StreamingResponse:
        return StreamingResponse(
            answer(request.state.client, asked),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description="a FastAPI service over the openai package")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--upstream", required=True, help="base URL, as http://127.0.0.1:9200/v1")
    options = parser.parse_args()
    # With the protocol named, asyncio switches Nagle's algorithm off on what it accepts.
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", options.port))
    sock.listen(2048)
    config = uvicorn.Config(build(options.upstream), access_log=False, log_level="warning")
    listening(sock.getsockname()[1])  # connections wait in the backlog until uvicorn is up
    uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    main()
