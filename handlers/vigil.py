"""The vigil: whoever may read no more is sent away within a second, wherever they read."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import orjson

from streaming.auth import Auth, Identity
from streaming.channels import Relay
from streaming.delivery import Delivery
from streaming.errors import Forbidden, RivuletError, Unauthorized, Unavailable
from streaming.tickets import HELD, Tickets

logger = logging.getLogger("rivulet.vigil")

LOOK = 0.5  # seconds between two looks at who is here


class Vigil:
    """Looks after the identities of all who read. relay: to the other instances, where there are
    any; address: the channel on which they tell each other whom to send away.
    """

    def __init__(
        self,
        auth: Auth,
        tickets: Tickets,
        deliveries: Sequence[Delivery],
        relay: Relay | None,
        address: str,
    ) -> None:
        self._auth = auth
        self._tickets = tickets
        self._deliveries = deliveries
        self._relay = relay
        self._address = address
        self._watching: asyncio.Task[None] | None = None
        self._kept = time.monotonic()

    async def start(self) -> None:
        """Begins."""
        if self._relay is not None:
            with contextlib.suppress(Unavailable):  # it is heard as soon as the bridge is back
                await self._relay.subscribe(self._address, self._told)
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Ends."""
        if self._watching is not None:
            self._watching.cancel()

    async def disconnect(self, user: str) -> None:
        """Sends this user away on all instances, and makes their tickets good for nothing. Raises
        Unavailable, and has then done it here.
        """
        self._dismiss(user)
        await self._tickets.forget(user)
        if self._relay is not None:
            await self._relay.publish(self._address, orjson.dumps({"user": user}))

    def _told(self, message: bytes) -> None:
        if message:
            self._dismiss(orjson.loads(message)["user"])

    def _dismiss(self, user: str) -> None:
        error = Forbidden("a moderator has ended your connections", code="disconnected")
        self._expel(lambda who: error if who.user == user else None)

    def _expel(self, reason: Callable[[Identity], RivuletError | None]) -> None:
        for delivery in self._deliveries:
            for sink in list(delivery):
                if sink.who is not None and (error := reason(sink.who)) is not None:
                    try:
                        sink.expel(error)
                    except Exception:  # the others are to go all the same
                        logger.exception("vigil broke")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK)
            try:
                self._look()
            except Exception:
                logger.exception("vigil broke")

    def _look(self) -> None:
        now = time.time()
        if not self._auth.open:
            self._auth.refresh()
            self._expel(lambda who: None if self._auth.valid(who, now) else _why(who, now))
        if time.monotonic() - self._kept > HELD:
            self._kept = time.monotonic()
            self._tickets.keep()


def _why(who: Identity, now: float) -> Unauthorized:
    if who.expires <= now:
        return Unauthorized("your token has expired", code="token_expired")
    return Unauthorized("your key has been taken back", code="token_revoked")
