"""The producer: a model call, and the task that writes what the model says into a generation.

It runs in a task of its own, never in a request's. Who reads it comes and goes; when nobody has
read it for `linger` seconds it is cancelled. Its log ends with exactly one of `finished`, `failed`,
`cancelled`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

from streaming import config
from streaming.clock import FlushClock
from streaming.errors import RivuletError, Unavailable, UpstreamError
from streaming.events import JSON, new_epoch
from streaming.generation import Ask, Generation
from streaming.log import Log, now_ms
from streaming.metrics import SLOW, Metrics
from streaming.models import Models, Route
from streaming.room import Room
from streaming.writer import Writer

logger = logging.getLogger("rivulet.generations")

RETRY_AFTER_MAX = 30.0  # seconds; an upstream that asks for more is not waited for
FINISH_GRACE = 2.0  # seconds for usage and [DONE] once the model has said that it is done
OVERHEAD = 8192  # bytes of an ended generation besides its text
COMING = 1.0  # seconds at least in which whoever has asked begins to read
KEYED_LINGER = 60.0  # seconds at least: whoever sends a key means to come back with it


class Producer(Generation):
    """A generation that is made here. `on_end` is called once, after the ending is in the log."""

    def __init__(
        self,
        ask: Ask,
        models: Models,
        clock: FlushClock,
        cfg: config.Generation,
        metrics: Metrics,
        on_end: Callable[[Producer], None],
    ) -> None:
        id = new_epoch()
        origin = {
            "stream_id": id,
            "conversation_id": ask.conversation_id,
            "room": ask.room.name if ask.room is not None else "",
            "model": ask.call.model or models.default_name,
            "created": now_ms(),
        }
        super().__init__(ask.owner, Log(origin, epoch=id), ask.dialect)
        self.ask = ask
        self.read_elsewhere = -math.inf  # when it last was, as time.monotonic() has it
        self._began = asyncio.get_running_loop().time()
        self._metrics = metrics
        self._models = models
        self._on_end = on_end
        self._clock = clock
        self._config = cfg
        keyed = ask.key is not None and not ask.key.flight
        self._linger = max(ask.linger, KEYED_LINGER) if keyed else ask.linger
        self._abandon: asyncio.TimerHandle | None = None
        self._writer = Writer(self.log, ask.call.params.get("n", 1), cfg.max_bytes)
        self._task: asyncio.Task[None] | None = None
        self._told = False  # its room knows that it has started
        self._ends_at = 0  # an offset far above, where another has ended it

    async def start(self) -> None:
        """Tells its room, and begins. The log has its first event when this returns. Raises
        Unavailable where its room cannot be told.
        """
        self.log.append("started", {"model": self.log.origin["model"]})
        if self.ask.room is not None:
            await self._tell_start(self.ask.room)
        if self.ending is None:
            self._task = asyncio.create_task(self._run())
            if not self.readers:  # whoever asked may have gone meanwhile
                self._unread(max(self._linger, COMING))

    async def _tell_start(self, room: Room) -> None:
        told: list[tuple[str, JSON]] = []
        if self.ask.said is not None:
            told.append(("message", {"user_id": self.owner, "content": self.ask.said}))
        model = self.log.origin["model"]
        started = {"stream_id": self.id, "user_id": self.owner, "model": model}
        told.append(("started", started))
        room.starting[self.id] = self.log
        try:
            await room.publish(told)
        except RivuletError as error:
            self._told = self.id in room.running  # it may have come through all the same
            self._fail(error)
            raise
        finally:
            room.starting.pop(self.id, None)
        self._told = True
        self._tell_end()  # of those who were told sooner one may have stopped it

    def _tell_end(self) -> None:
        """Tells its room of the end that it has come to, if the room knows of the start. An
        instance that has fenced this one has told it.
        """
        room, ending = self.ask.room, self.ending
        if room is not None and ending is not None and self._told and not self._ends_at:
            told = {"stream_id": self.id, "user_id": self.owner, "content": self.text()}
            room.keeper.conclude(room, ending.type, {**told, **ending.data})

    def __enter__(self) -> None:
        super().__enter__()
        if self._abandon is not None:
            self._abandon.cancel()
            self._abandon = None

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if not self.readers and self.ending is None:
            self._unread(self._linger)

    def _unread(self, wait: float) -> None:
        """Nobody reads it directly any more; when time is up, who follows its room counts, or did
        so not long ago.
        """
        self._abandon = asyncio.get_running_loop().call_later(wait, self._abandoned)

    def _abandoned(self) -> None:
        room = self.ask.room
        if room is not None and (any(room.people.values()) or any(room.elsewhere.values())):
            self._unread(self._linger)
            return
        last = max(self.read_elsewhere, room.left if room is not None else -math.inf)
        if (left := last + self._linger - time.monotonic()) > 0:
            self._unread(left)
        else:
            self._cancel("abandoned")

    def stop(self) -> None:
        """Ends it as `cancelled` and closes the upstream's connection; after the end, nothing."""
        self._cancel("stopped")

    def fenced(self, error: RivuletError, offset: int) -> None:
        """Another instance has ended it, at this offset, and told its room: here it ends there too,
        so that whoever has read that end is at the end.
        """
        self._ends_at = offset
        self._fail(error)
        if self._task is not None:
            self._task.cancel()

    @property
    def cost(self) -> int:
        """Bytes of memory that it takes once it has ended, roughly."""
        return self.log.size * 3 + OVERHEAD

    def _cancel(self, reason: str) -> None:
        if self.ending is None:
            self._end("cancelled", {"reason": reason})
            if self._task is not None:
                self._task.cancel()

    def _end(self, type: str, data: JSON) -> None:
        """The one place where a generation ends. Nothing is appended after it."""
        if self.ending is not None:
            return
        self._writer.close_parts()
        usage = self._writer.usage(self.ask.call.messages)
        data = {**data, "usage": usage, "model": self.log.origin["model"]}
        self._account(type, data)
        if self._ends_at:
            self.log.skip(self._ends_at - 1)
        self.ending = self.log.append(type, data)
        self.log.close()
        if self._abandon is not None:
            self._abandon.cancel()
        self._tell_end()
        self._on_end(self)

    def _account(self, type: str, data: JSON) -> None:
        """Counts it, just before its ending is in the log, and says what an operator is to know."""
        metrics, usage = self._metrics, data["usage"]
        metrics.endings[type] += 1
        metrics.generated += self.log.top + 1
        metrics.prompt_tokens += usage["prompt_tokens"]
        metrics.completion_tokens += usage["completion_tokens"]
        seconds = asyncio.get_running_loop().time() - self._began
        if type == "failed":
            status = data.get("upstream_status")  # never the message: the upstream chose its words
            self._warn("generation failed", seconds, code=data["error"]["code"], status=status)
        elif self.first_token is None and seconds > SLOW:
            self._warn("no token came", seconds)

    def _first(self, seconds: float) -> None:
        """Its first token has come."""
        self.first_token = seconds
        self._metrics.first_token.observe(seconds)
        if seconds > SLOW:
            self._warn("first token was late", seconds)

    def _warn(self, event: str, seconds: float, **more: object) -> None:
        whose = {"stream_id": self.id, "request_id": self.ask.request_id}
        logger.warning(event, extra={**whose, "seconds": round(seconds, 4), **more})

    def _fail(self, error: RivuletError) -> None:
        data = {"error": error.body(self.ask.request_id), "status": error.status}
        if error.retry_after is not None:
            data["retry_after"] = error.retry_after
        if isinstance(error, UpstreamError) and error.upstream_status:
            data["upstream_status"] = error.upstream_status
        self._end("failed", data)

    async def _run(self) -> None:
        try:
            await self._answer()
        except UpstreamError as error:
            self._fail(error)
        except asyncio.CancelledError:
            # By `close`; a stop has ended it already. Nobody asked for this: it has failed.
            self._fail(Unavailable("the server is going away", code="shutting_down", retry_after=1))
            raise
        except Exception:
            logger.exception("generation broke", extra={"stream_id": self.id})
            self._fail(RivuletError("internal error"))
        else:
            reasons = self._writer.finish_reasons
            data: JSON = {"finish_reason": reasons.get(0, "stop")}
            if len(reasons) > 1:
                data["finish_reasons"] = {str(n): reason for n, reason in sorted(reasons.items())}
            self._end("finished", data)

    async def _answer(self) -> None:
        """Tries the model, again where that may help, then its fallbacks in order; never again once
        a token has come. Raises UpstreamError: the last attempt's, or total_timeout.
        """
        failure: UpstreamError | None = None
        metrics = self._metrics
        last = asyncio.get_running_loop().time() + self._config.total_timeout
        for route in self._models.routes(self.ask.call.model):
            for attempt in range(self._config.retries + 1):
                metrics.retries += failure is not None
                try:
                    return await self._attempt(route, last)
                except UpstreamError as error:
                    failure = error
                    metrics.upstream_errors[route.source.name, error.code] += 1
                if self._writer.spoken or failure.upstream_status in (400, 413, 422):
                    raise failure  # said already; or asked wrongly, which no other model mends
                wait = failure.retry_after or 0.0
                if not failure.retryable or wait > RETRY_AFTER_MAX:
                    break
                if attempt < self._config.retries:
                    longest = min(self._config.backoff * 2**attempt, self._config.backoff_max)
                    await self._back_off(max(wait, longest * random.uniform(0.5, 1)), last)
        assert failure is not None
        raise failure

    async def _back_off(self, wait: float, last: float) -> None:
        try:
            async with asyncio.timeout_at(last):
                await asyncio.sleep(wait)
        except TimeoutError:
            raise self._out_of_time() from None

    async def _attempt(self, route: Route, last: float) -> None:
        """One model call, until `last` at most: one deadline for all three timeouts, which is moved
        as the answer goes on.
        """
        cfg, writer = self._config, self._writer
        loop = asyncio.get_running_loop()
        call = replace(self.ask.call, model=route.model)
        self.log.origin = {**self.log.origin, "model": route.model}
        extended = before = 0.0
        deadline = asyncio.timeout_at(min(loop.time() + cfg.first_token_timeout, last))
        try:
            async with deadline, aclosing(route.source.stream(call)) as batches:
                async for pieces in batches:
                    later = writer.spoken
                    writer.write(pieces)
                    del pieces
                    now = loop.time()
                    if writer.complete:
                        deadline.reschedule(min(now + FINISH_GRACE, last))
                    if not writer.spoken:
                        continue
                    if not later:
                        self._first(now - self._began)
                    elif not writer.complete:
                        self._metrics.token_gap.observe(now - before)
                    before = now
                    if now > extended and not writer.complete:
                        # Moving a timer costs more than a token: move it a tenth at a time.
                        extended = now + cfg.idle_timeout * 0.1
                        deadline.reschedule(min(now + cfg.idle_timeout * 1.1, last))
                    if later and not writer.complete:
                        await self._clock.rest()
        except TimeoutError:
            if not writer.complete:
                late = self._out_of_time() if deadline.when() == last else self._silence()
                raise late from None
        except UpstreamError:
            if not writer.complete:
                raise
        if not writer.whole:
            raise UpstreamError("upstream_cut", "the model's answer ended without a finish reason")

    def _out_of_time(self) -> UpstreamError:
        limit = self._config.total_timeout
        return UpstreamError("total_timeout", f"the answer took longer than {limit:g} s")

    def _silence(self) -> UpstreamError:
        if self._writer.spoken:
            limit = self._config.idle_timeout
            return UpstreamError("idle_timeout", f"the model said nothing for {limit:g} s")
        limit = self._config.first_token_timeout
        return UpstreamError("first_token_timeout", f"no answer began within {limit:g} s")

    async def close(self) -> None:
        """Cancels it and waits until the upstream's connection is closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
