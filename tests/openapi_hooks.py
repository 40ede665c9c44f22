"""What schemathesis is told beside the document: its `SCHEMATHESIS_HOOKS`."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import orjson
import schemathesis
from jsonschema_rs import Draft202012Validator

NDJSON = "application/x-ndjson"
SHORT = {"count": 3, "interval": 0}  # what /api/stream is asked for at most: it would take its time
streams: list[str] = []  # the last one that the server has begun


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Counts are short, where they are counts at all; streams asked for and positions are real."""
    positions = [f"{stream}-1" for stream in streams]
    if case.operation.path == "/api/stream":
        positions = ["api_stream_count-5"]  # the end of three
        query = case.query = {**SHORT, **case.query}
        for name, most in SHORT.items():
            with suppress(TypeError, ValueError):
                query[name] = most if float(query[name]) > most else query[name]
    if streams and "{id}" in case.operation.path:
        case.path_parameters["id"] = streams[-1]
    if positions and "last_event_id" in case.query:
        case.query["last_event_id"] = positions[-1]


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Remembers a stream that has begun."""
    streams[:] = response.headers.get("x-stream-id", streams)


@schemathesis.check
def every_line_conforms(context: Any, response: Any, case: Any) -> None:
    """Each line of NDJSON is of its schema. Events of event streams are looked at as it is."""
    if response.headers.get("content-type") != [NDJSON]:
        return
    schema = case.operation.definition.raw["responses"]["200"]["content"][NDJSON]["schema"]
    components = case.operation.schema.raw_schema["components"]
    validator = Draft202012Validator({**schema, "components": components})
    for line in response.content.splitlines():
        validator.validate(orjson.loads(line))
