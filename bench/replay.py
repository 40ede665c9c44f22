"""What a replay puts on the wire: bytes, chunks and, where strace may look, system calls."""

import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Server
from bench.wire import exchange, request

_CALLS = "write,writev,sendto,sendmsg,sendfile"


@dataclass(frozen=True)
class Replay:
    """One finished answer, read again.

    Attributes:
        text_bytes: of the answer's text alone, in UTF-8.
        body_bytes: of the body without its chunked coding.
        wire_bytes: of all that came on the socket.
        chunks: of the chunked coding.
        system_calls: write calls on this reader's socket, head included; None without strace.
    """

    text_bytes: int
    body_bytes: int
    wire_bytes: int
    chunks: int
    system_calls: int | None


@contextmanager
def _traced(pid: int, log: Path) -> Iterator[bool]:
    """Writes this process's write calls into `log` while the block runs; says whether it can."""
    if not shutil.which("strace"):
        yield False
        return
    command = ["strace", "-f", "-yy", "-s", "0", "-e", f"trace={_CALLS}", "-o", str(log)]
    with subprocess.Popen(
        [*command, "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stderr
        try:
            yield "attached" in tracer.stderr.readline()
        finally:
            tracer.terminate()


def measure(server: Server, path: str, events: str, model: str) -> Replay:
    """Has one answer generated and read to its end, then reads it again.

    Raises RuntimeError where the replay's text is not the answer's, and as `wire.exchange` does.
    """
    address = ("127.0.0.1", server.port)
    host = f"127.0.0.1:{server.port}"
    ndjson = "Accept: application/x-ndjson"
    body = json.dumps({"prompt": "hi", "model": model, "stream": True}).encode()
    first = exchange(address, request("POST", path, host, body, ndjson))
    again = events.replace("{id}", first.head.headers["x-stream-id"])
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "strace")
        with _traced(server.pid, log) as tracing:
            second = exchange(address, request("GET", again, host, b"", ndjson))
            time.sleep(0.2)  # strace writes its log a little later
        calls = None
        if tracing:
            client = re.compile(rf"->127\.0\.0\.1:{second.local_port}\]")
            calls = len(client.findall(log.read_text()))
    text = _text(second.body)
    if not text or text != _text(first.body):
        raise RuntimeError(f"the replay differs: {first.body[:300]!r} {second.body[:300]!r}")
    return Replay(
        text_bytes=len(text.encode()),
        body_bytes=len(second.body),
        wire_bytes=second.wire_bytes,
        chunks=second.chunks,
        system_calls=calls,
    )


def _text(body: bytes) -> str:
    return "".join(json.loads(line).get("content", "") for line in body.splitlines())
