"""Which rooms live on other instances: all are asked, and each says what it holds.

Nothing is kept for this anywhere, so that a room costs nothing between two questions.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable

import orjson

from streaming.errors import Unavailable
from streaming.events import JSON
from streaming.redis_link import Link

PATIENCE = 1.0  # seconds for the others to answer: one of them may be frozen


class Listing:
    """This instance's part in it. held: which rooms live here."""

    def __init__(self, link: Link, held: Callable[[], list[JSON]]) -> None:
        self._link = link
        self._everybody = f"{link.prefix}instances"
        self._held = held
        self._numbers = itertools.count()
        self._asking: dict[int, asyncio.Queue[list[JSON]]] = {}

    async def start(self) -> None:
        """Answers from now on, or from when Redis is heard."""
        with contextlib.suppress(Unavailable):
            await self._link.subscribe(self._everybody, self._asked)

    async def ask(self) -> tuple[list[JSON], bool]:
        """What the others hold, and whether all of them have answered."""
        number, found = next(self._numbers), list[JSON]()
        answers = self._asking[number] = asyncio.Queue()
        word = orjson.dumps({"by": self._link.me, "number": number})
        try:
            async with asyncio.timeout(PATIENCE):
                for _ in range(await self._link.publish(self._everybody, word)):
                    found += await answers.get()
        except (TimeoutError, Unavailable):
            return found, False
        finally:
            del self._asking[number]
        return found, True

    def _asked(self, message: bytes) -> None:
        if not message:
            return
        word = orjson.loads(message)
        held = self._held() if word["by"] != self._link.me else []
        answer = orjson.dumps({"listed": word["number"], "rooms": held})
        self._link.say(self._link.instance(word["by"]), answer)

    def told(self, word: JSON) -> None:
        """An instance has answered, perhaps too late."""
        if (answers := self._asking.get(word["listed"])) is not None:
            answers.put_nowait(word["rooms"])
