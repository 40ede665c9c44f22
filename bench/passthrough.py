"""The cheapest peer there is: an aiohttp proxy that hands on what the upstream sends, unparsed."""

import argparse
import asyncio

import aiohttp
from aiohttp import web

from bench.upstream import listening

_SESSION = web.AppKey("session", aiohttp.ClientSession)
_UPSTREAM = web.AppKey("upstream", str)


async def relay(request: web.Request) -> web.StreamResponse:
    """Sends the body on as it is and writes each piece of the answer as it comes."""
    app = request.app
    headers = {"Content-Type": "application/json", "Authorization": "Bearer x"}
    url = f"{app[_UPSTREAM]}/chat/completions"
    async with app[_SESSION].post(url, data=await request.read(), headers=headers) as upstream:
        response = web.StreamResponse(
            status=upstream.status,
            headers={"Content-Type": upstream.headers["Content-Type"], "X-Accel-Buffering": "no"},
        )
        await response.prepare(request)
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def serve(port: int, upstream: str) -> None:
    """Serves until the process is ended."""
    app = web.Application()
    app[_UPSTREAM] = upstream
    app.router.add_post("/api/v1/ai/generate/stream", relay)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        app[_SESSION] = session
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=2048).start()
        listening(runner.addresses[0][1])
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="an aiohttp pass-through")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--upstream", required=True, help="base URL, as http://127.0.0.1:9200/v1")
    options = parser.parse_args()
    asyncio.run(serve(options.port, options.upstream))


if __name__ == "__main__":
    main()
