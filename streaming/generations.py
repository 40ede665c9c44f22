"""All generations of this instance: those that run, and those that ended not long ago."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from streaming import config
from streaming.clock import FlushClock
from streaming.errors import InvalidField, Unavailable
from streaming.generation import Ask, Generation, Key
from streaming.models import Models


class Generations:
    """The registry: starts them, finds them, and forgets them."""

    def __init__(self, cfg: config.Generation, models: Models) -> None:
        self.models = models
        self._config = cfg
        self._clock = FlushClock(cfg.flush_interval)
        self._held: dict[str, Generation] = {}
        self._running: dict[str, Generation] = {}
        self._keys: dict[tuple[str, str], Generation] = {}
        self._leaving: deque[tuple[float, Generation]] = deque()  # ended; when each leaves
        self._leaving_bytes = 0

    @property
    def running(self) -> int:
        """How many run now."""
        return len(self._running)

    async def start(self, ask: Ask) -> Generation:
        """Starts a generation, or finds the one that the same key has started. Cancelling it starts
        it all the same.

        Raises InvalidField where the key came with another body before, Unavailable where too many
        run. A key is free again when its generation failed or was abandoned.
        """
        if (found := self.started(ask.key)) is not None:
            return found
        self._sweep()
        if len(self._running) >= self._config.max_running:
            raise Unavailable("too many answers are running", code="overloaded", retry_after=5)
        generation = Generation(ask, self.models, self._clock, self._config, self._ended)
        self._held[generation.id] = self._running[generation.id] = generation
        if ask.key is not None:
            self._keys[ask.key.scope, ask.key.key] = generation
        await generation.start()
        return generation

    def started(self, key: Key | None) -> Generation | None:
        """The generation that this key has started before, if any. Raises InvalidField."""
        found = self._keys.get((key.scope, key.key)) if key is not None else None
        if found is not None and found.ask.key != key:
            raise InvalidField("Idempotency-Key", "was used before with a different body")
        return found

    def find(self, stream_id: str, owner: str) -> Generation | None:
        """The generation of this id, if this person may know of it."""
        self._sweep()
        generation = self._held.get(stream_id)
        return generation if generation is not None and generation.known_to(owner) else None

    def _ended(self, generation: Generation) -> None:
        assert generation.ending is not None
        del self._running[generation.id]
        key, ending = generation.ask.key, generation.ending
        abandoned = ending.data.get("reason") == "abandoned"
        if key is not None and (key.flight or ending.type == "failed" or abandoned):
            self._free(generation)
        self._leaving.append((time.monotonic() + self._config.retention, generation))
        self._leaving_bytes += generation.cost
        self._sweep()

    def _sweep(self) -> None:
        """Lets go of ended generations that are past their retention, or past the bound on memory.
        Called whenever one is started, looked for or ended: a timer of its own would change nothing
        that anybody sees.
        """
        now = time.monotonic()
        while self._leaving and (
            self._leaving[0][0] <= now or self._leaving_bytes > self._config.retained_bytes
        ):
            _, generation = self._leaving.popleft()
            self._leaving_bytes -= generation.cost
            del self._held[generation.id]
            self._free(generation)

    def _free(self, generation: Generation) -> None:
        key = generation.ask.key
        if key is not None and self._keys.get((key.scope, key.key)) is generation:
            del self._keys[key.scope, key.key]

    async def finish(self, patience: float) -> None:
        """Waits until no generation runs, for `patience` seconds at most."""
        try:
            async with asyncio.timeout(patience):
                while self._running:
                    await next(iter(self._running.values())).ended()
        except TimeoutError:
            pass

    async def close(self) -> None:
        """Cancels what still runs, and closes the upstreams' connections."""
        await asyncio.gather(*(g.close() for g in list(self._running.values())))
        await self.models.close()
