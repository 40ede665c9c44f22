"""Clients in JavaScript, run by Node.js."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


async def run_js(script: str, *arguments: Any, seconds: float = 90.0) -> Any:
    """Runs a script of this directory; what is no string goes to it as JSON. Returns the JSON that
    it prints. Raises RuntimeError with its stderr when it fails, TimeoutError when it is late."""
    words = [each if isinstance(each, str) else json.dumps(each) for each in arguments]
    child = await asyncio.create_subprocess_exec(
        "node",
        str(HERE / script),
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(child.communicate(), seconds)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise RuntimeError(f"{script}: {err.decode()}")
    return json.loads(out)
