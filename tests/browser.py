"""Headless Chromium as a client.

A test gives the body of an async function in JavaScript; it runs in a page that comes from a front
(tests/front.py), so that the server is its own origin, and gets back what the function returns.
`fetchEventSource` of @microsoft/fetch-event-source is there by that name, and `heard(id)` tells the
front that the page has the message with this id.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from tests.front import HEARD, PAGE, Front
from tests.processes import ROOT

MODULES = (
    ROOT / "tests" / "js" / "node_modules" / "@microsoft" / "fetch-event-source" / "lib" / "esm"
)
# Without the background flags Chromium looks for Google's hosts at every start.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-popup-blocking"),
    "--host-resolver-rules=MAP *.test 127.0.0.1",
)

TEMPLATE = """<!doctype html><meta charset="utf-8"><title>test</title>
<script type="module">
const report = (result) =>
  fetch("%(results)s/result", {method: "POST", mode: "no-cors", body: JSON.stringify(result)});
addEventListener("unhandledrejection", (e) => report({error: String(e.reason?.stack ?? e.reason)}));
addEventListener("error", (e) => report({error: String(e.error?.stack ?? e.message)}));
const { fetchEventSource } = await import("%(results)s/fetch-event-source/index.js");
const given = %(given)s;
const heard = (id) => void fetch("%(heard)s" + encodeURIComponent(id)).catch(() => {});
try {
  const value = await (async () => {
%(script)s
  })();
  report({value: value ?? null});
} catch (e) {
  report({error: String(e?.stack ?? e)});
}
</script>
"""


class PageError(AssertionError):
    """The page's script threw."""


class Browser:
    """Runs pages; each in a Chromium of its own, with an empty profile."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._runs = 0
        self._result: asyncio.Future[dict[str, Any]] | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_post("/result", self._take)
        app.router.add_get("/fetch-event-source/{file}", self._module)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def run(
        self,
        front: Front,
        script: str,
        seconds: float = 60.0,
        host: str = "127.0.0.1",
        **given: Any,
    ) -> Any:
        """What `script` returns; it finds the keyword arguments in `given`. host: by which name the
        page knows this machine, `*.test` for one. Raises PageError when it throws, TimeoutError
        when it does not end.
        """
        self._runs += 1
        self._result = asyncio.get_running_loop().create_future()
        front.page = TEMPLATE % {
            "results": self.url,
            "heard": HEARD,
            "given": json.dumps(given).replace("<", "\\u003c"),
            "script": script,
        }
        profile = self.directory / f"profile-{self._runs}"
        chromium = await asyncio.create_subprocess_exec(
            shutil.which("chromium") or "chromium",
            *FLAGS,
            f"--user-data-dir={profile}",
            front.url.replace("127.0.0.1", host) + PAGE,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            result = await asyncio.wait_for(self._result, seconds)
        finally:
            chromium.kill()
            await chromium.wait()
        if "error" in result:
            raise PageError(result["error"])
        return result["value"]

    async def _take(self, request: web.Request) -> web.Response:
        if self._result and not self._result.done():
            self._result.set_result(json.loads(await request.text()))
        return web.Response(headers={"Access-Control-Allow-Origin": "*"})

    async def _module(self, request: web.Request) -> web.Response:
        """A file of the package. Its imports have no extension, which a browser needs."""
        source = (MODULES / Path(request.match_info["file"]).name).read_text()
        source = re.sub(r"from '(\./\w+)'", r"from '\1.js'", source)
        return web.Response(
            text=source,
            content_type="text/javascript",
            headers={"Access-Control-Allow-Origin": "*"},
        )
