"""/openapi.json: it is valid, has every route and no other, and the server does as it says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from jsonschema_rs import Draft202012Validator
from openapi_spec_validator import validate

from app import build
from handlers.openapi import document
from streaming.config import Config
from tests.conftest import SOAK, StartServer
from tests.inside import in_process
from tests.people import new_room
from tests.processes import ROOT, Server
from tests.readers import Ndjson, Sse, ask

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "every_line_conforms",
)  # fmt: skip
# They have no end, and schemathesis waits for one: what they say is looked at below.
ENDLESS = {
    "/api/v1/rooms/{room}/events": "joined",
    "/api/v1/sse/stream/{channel}": "connected",
}
PHASES = "coverage,fuzzing,stateful" if SOAK else "coverage,fuzzing"
EXAMPLES = 300 if SOAK else 3


def test_every_route_is_in_it_and_no_other() -> None:
    """With its methods."""
    routes = build(Config()).router.routes()
    routed = {(route.resource.canonical, route.method) for route in routes if route.resource}
    paths = document()["paths"]
    assert routed == {(path, method.upper()) for path, does in paths.items() for method in does}


def test_it_is_valid() -> None:
    """By the rules of OpenAPI, and each name in it is one."""
    validate(document())


def test_a_body_may_come_too_late() -> None:
    """Whoever sends one is told by 408, and nobody else."""
    for does in document()["paths"].values():
        for operation in does.values():
            assert ("requestBody" in operation) is ("408" in operation["responses"])


async def test_it_is_served_once_to_each(demo_server: Server) -> None:
    """Whoever has it is told that it is as it was."""
    url = f"{demo_server.url}/openapi.json"
    async with ask("GET", url) as answer:
        assert answer.headers["content-type"].startswith("application/json")
        assert await answer.json() == document()
        known = answer.headers["etag"]
    async with ask("GET", url, headers={"If-None-Match": known}) as answer:
        assert (answer.status, await answer.body()) == (304, b"")
    async with ask("GET", url, headers={"If-None-Match": '"another"'}) as answer:
        assert answer.status == 200


async def test_mounted_under_a_prefix_it_says_so() -> None:
    """Paths are those below it."""
    house = web.Application()
    house.add_subapp("/ai", build(Config()))
    async with in_process(house) as url, ask("GET", f"{url}/ai/openapi.json") as answer:
        assert (await answer.json())["servers"] == [{"url": "/ai"}]


async def test_endless_streams_are_as_it_says(demo_server: Server) -> None:
    """Their first frame, in both framings."""
    for path, first in ENDLESS.items():
        media = document()["paths"][path]["get"]["responses"]["200"]["content"]
        url = f"{demo_server.url}{path.replace('{room}', new_room()).replace('{channel}', 'news')}"
        async with ask("GET", url) as answer:
            message = await anext(answer.items(Sse()))
        lines = media["application/x-ndjson"]["schema"]
        assert message.event == first
        conforms(message.json(), lines)
        conforms(message._asdict(), media["text/event-stream"]["schema"])
        async with ask("GET", f"{url}?format=ndjson") as answer:
            conforms(await anext(answer.items(Ndjson())), lines)
        async with ask("GET", f"{url}?format=text") as answer:
            assert answer.status == 422 and "text/plain" not in media


def conforms(value: Any, schema: Mapping[str, Any]) -> None:
    """Raises where it does not."""
    components = document()["components"]
    Draft202012Validator({**schema, "components": components}).validate(value)


def test_schemathesis_finds_nothing(server: StartServer, tmp_path: Path) -> None:
    """No 5xx, no undocumented status or media type, no answer of another shape."""
    process = server(demo={"max_tokens": 3})
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{process.url}/openapi.json"),
        *(f"--exclude-path={path}" for path in ENDLESS),
        *(f"--checks={','.join(CHECKS)}", f"--phases={PHASES}", f"--max-examples={EXAMPLES}"),
        *("--generation-deterministic", "--suppress-health-check=all", "--request-timeout=20"),
        *("--warnings=off", "--no-color"),
    ]
    env = {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.openapi_hooks"}
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert not process.log_lines("handler broke")
    answered = {line["status"] for line in process.log_lines("request")}
    assert answered >= {200, 201, 202, 204, 400, 404, 405, 410, 413, 422}  # it did try
