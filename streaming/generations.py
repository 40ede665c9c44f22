"""All generations of this instance: those that run, and those that ended not long ago."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import Protocol

from streaming import config
from streaming.auth import Identity
from streaming.clock import FlushClock
from streaming.errors import InvalidField, Unavailable
from streaming.generation import Ask, Generation, Key
from streaming.limits import Limits
from streaming.metrics import Metrics
from streaming.models import Models
from streaming.producer import Producer


class Mirror(Protocol):
    """What makes the generations of this instance known to others, and theirs known here."""

    async def claim(self, generation: Producer) -> str:
        """Makes it known, before its id leaves; the id of another that its key has started before,
        or "". From then on it follows the generation's log.
        """

    async def find(self, stream_id: str) -> Generation | None:
        """A generation of another instance. Raises Unavailable."""

    def free(self, key: Key, stream_id: str) -> None:
        """What this key has started failed or was abandoned: it may start another."""


class Generations:
    """The registry: starts them, finds them, and forgets them."""

    def __init__(
        self,
        cfg: config.Generation,
        models: Models,
        mirror: Mirror | None,
        metrics: Metrics,
        limits: Limits,
    ) -> None:
        self.models = models
        self._limits = limits
        self._metrics = metrics
        self._mirror = mirror
        self._config = cfg
        self._clock = FlushClock(cfg.flush_interval)
        self._held: dict[str, Producer] = {}
        self._running: dict[str, Producer] = {}
        self._keys: dict[tuple[str, str], Producer] = {}
        self._starting: dict[str, asyncio.Task[Generation]] = {}  # by id
        self._leaving: deque[tuple[float, Producer]] = deque()  # ended; when each leaves
        self._leaving_bytes = 0

    @property
    def running(self) -> int:
        """How many run now."""
        return len(self._running)

    async def start(self, ask: Ask) -> Generation:
        """Starts a generation, or finds the one that the same key has started. Cancelling it starts
        it all the same.

        Raises InvalidField where the key came with another body before, Unavailable where too many
        run, TooMany where too many of the owner's do. A key is free again when its generation
        failed or was abandoned.
        """
        if (found := await self.started(ask.key)) is not None:
            return found
        await self._limits.acquire("running", ask.owner)
        generation = None
        try:
            # Once more: another with this key may have come meanwhile. From here nobody is waited
            # for until the key is taken.
            if (found := await self.started(ask.key)) is None:
                generation = self._make(ask)
        finally:
            if generation is None:
                self._limits.release("running", ask.owner)
        if generation is None:
            assert found is not None
            return found
        if self._mirror is None:
            await generation.start()
            return generation
        task = asyncio.create_task(self._start(generation, self._mirror))
        self._starting[generation.id] = task
        task.add_done_callback(lambda _: self._starting.pop(generation.id))
        return await asyncio.shield(task)

    def _make(self, ask: Ask) -> Producer:
        self._sweep()
        if len(self._running) >= self._config.max_running:
            raise Unavailable("too many answers are running", code="overloaded", retry_after=5)
        shared = self.models, self._clock, self._config, self._metrics
        generation = Producer(ask, *shared, self._ended)
        self._held[generation.id] = self._running[generation.id] = generation
        if ask.key is not None:
            self._keys[ask.key.scope, ask.key.key] = generation
        return generation

    async def _start(self, generation: Producer, mirror: Mirror) -> Generation:
        try:
            while before := await mirror.claim(generation):
                if (found := await mirror.find(before)) is not None:
                    self._withdraw(generation)
                    return found
        except BaseException:
            self._withdraw(generation)
            raise
        await generation.start()
        return generation

    def _withdraw(self, generation: Producer) -> None:
        """It does not start after all."""
        del self._held[generation.id], self._running[generation.id]
        self._limits.release("running", generation.owner)
        self._free(generation)

    async def started(self, key: Key | None) -> Generation | None:
        """The generation that this key has started before, if any. Raises InvalidField, and what
        its start raises.
        """
        found = self._keys.get((key.scope, key.key)) if key is not None else None
        if found is None:
            return None
        if found.ask.key != key:
            raise InvalidField("Idempotency-Key", "was used before with a different body")
        starting = self._starting.get(found.id)  # perhaps it is found to run elsewhere
        return found if starting is None else await asyncio.shield(starting)

    async def find(
        self, stream_id: str, who: Identity, action: str = "subscribe"
    ) -> Generation | None:
        """The generation of this id, if this person may do that with it. Raises Unavailable."""
        self._sweep()
        generation: Generation | None = self._held.get(stream_id)
        if generation is None and self._mirror is not None:
            generation = await self._mirror.find(stream_id)
        if generation is None or not generation.open_to(who, action):
            return None
        return generation

    def _ended(self, generation: Producer) -> None:
        del self._running[generation.id]
        self._limits.release("running", generation.owner)
        key = generation.ask.key
        if key is not None and not generation.keeps_key(key):
            self._free(generation)
            if self._mirror is not None:
                self._mirror.free(key, generation.id)
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
            self._held.pop(generation.id, None)
            self._free(generation)

    def _free(self, generation: Producer) -> None:
        key = generation.ask.key
        if key is not None and self._keys.get((key.scope, key.key)) is generation:
            del self._keys[key.scope, key.key]

    def held_here(self, stream_id: str) -> Producer | None:
        """The generation of this id, where it is made on this instance."""
        return self._held.get(stream_id)

    def drop(self, generation: Producer) -> None:
        """Forgets one that another instance has ended: that ending counts."""
        self._held.pop(generation.id, None)

    async def finish(self, patience: float) -> None:
        """Waits until no generation runs, for `patience` seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._running:
                    await next(iter(self._running.values())).ended()

    async def close(self) -> None:
        """Cancels what still runs, and closes the upstreams' connections."""
        await asyncio.gather(*(g.close() for g in list(self._running.values())))
        await self.models.close()
