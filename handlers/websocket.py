"""WebSocket: many rooms on one socket, or one by its path; frames are JSON text.

Each frame of a client is a row of FRAMES, at the end of the file. A frame that is wrong gets an
`error` frame, and the connection stays.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Hashable, Mapping

from aiohttp import WSCloseCode, web

from handlers.chat import Question, begin
from handlers.identity import NOBODY, address_of, check_room, check_stop
from handlers.keys import (
    AUTH,
    CONFIG,
    DELIVERY,
    GENERATIONS,
    IDENTITY,
    LIMITS,
    PRESENCE,
    REFUSED,
    REQUEST_ID,
    ROOMS,
    USER,
)
from handlers.reading import Fields, last_event_id, parse
from handlers.rooms import history, is_personal, said
from streaming.auth import Identity
from streaming.encoders import text_frame
from streaming.errors import (
    BadRequest,
    Forbidden,
    InvalidField,
    NotFound,
    RivuletError,
    Unauthorized,
    Unavailable,
)
from streaming.events import JSON
from streaming.limits import Entry
from streaming.room import Room
from streaming.sockets import BINARY, SocketSink, open_socket

access = logging.getLogger("rivulet.access")
logger = logging.getLogger("rivulet.websocket")

ROOMS_MOST = 1000  # on one socket
SAY_WHO = 10.0  # seconds in which a client without credentials has to authenticate
FIRST = frozenset(("authenticate", "ping"))  # frames that may come before that
# Close codes of the protocol's private range, by the status that the error has over HTTP.
CLOSES = {401: 4401, 403: 4403, 404: 4403, 429: 4429, 503: int(WSCloseCode.TRY_AGAIN_LATER)}


class Connection:
    """One client on one socket: who it is, and where. path: the room of its path, or ""."""

    __slots__ = ("_after", "_app", "_entry", "_limits", "_request_id", "_rooms", "path", "sink")

    sink: SocketSink
    _entry: Entry

    def __init__(self, request: web.Request) -> None:
        self.path = request.match_info.get("room", "")
        self._app = request.app
        self._after = last_event_id(request)
        self._request_id = request[REQUEST_ID]
        self._limits = request.app[CONFIG].limits
        self._rooms: dict[str, Room] = {}

    async def shake(
        self, request: web.Request, most: int, compression: bool = False
    ) -> web.StreamResponse:
        """Opens the socket; see `open_socket`. Raises BadRequest, TooMany, Unavailable."""
        self._entry = await self._app[LIMITS].admit(address_of(request), request[USER])
        try:
            self.sink, response = await open_socket(self._app[DELIVERY], request, most, compression)
        except BaseException:
            self._entry.leave()
            raise
        self.sink.listener, self.sink.who = self, request[IDENTITY]
        return response

    @property
    def _who(self) -> Identity:
        return self.sink.who or NOBODY

    @property
    def _user(self) -> str:
        return self._who.user

    async def open(self, who: Identity) -> list[Room]:
        """The rooms where this person is at first: their own, of which nothing is said, and that of
        the path. Raises Forbidden, NotFound, Unavailable.
        """
        names = [f"user:{who.user}"] if who.user != "anonymous" else []
        names += [check_room(self.path, who, "subscribe")] if self.path else []
        rooms = self._app[ROOMS]
        after = {self.path: self._after}
        return [await rooms.open(name, after.get(name)) for name in dict.fromkeys(names)]

    def begin(self, rooms: list[Room]) -> None:
        """It is known who it is: comes into these rooms."""
        for room in rooms:
            if room.name == self.path:
                self.enter(room, self._after)
            else:
                self.sink.follow(room.join(None)[0])
        self._after = None  # it may be as long as a URL

    def refuse(self, error: RivuletError) -> None:
        """Tells why, and closes."""
        self.sink.send(self._error(error))
        self.sink.close(CLOSES.get(error.status, WSCloseCode.POLICY_VIOLATION), error.code)

    def unnamed(self) -> None:
        """Some time has passed: closes where it has not been said who it is."""
        if self._who is NOBODY and self.sink.listener is self:
            self.refuse(Unauthorized("authenticate first", code="token_missing"))

    def enter(self, room: Room, after: str | None, ref: object = None) -> None:
        """Comes into a room that is open, and is told where it stands."""
        before = self._rooms.get(room.name)
        if room is not before:
            self._app[PRESENCE].enter(room, self._user)
            self._rooms[room.name] = room
            if before is not None:  # it was deleted, and its end is not told yet
                self._app[PRESENCE].leave(before, self._user)
        cursor, opening = room.join(after)
        told = [item for event in opening for item in self.sink.encoder.dialect.say(event) or ()]
        for frame in told[:-1]:
            self.sink.send(frame)
        self._reply(told[-1], ref)
        self.sink.follow(cursor)

    def _reply(self, frame: JSON, ref: object) -> None:
        self.sink.send(frame if ref is None else {**frame, "ref": ref})

    def ended(self, source: Hashable) -> None:
        """A room has been deleted, and its end told."""
        assert isinstance(source, Room)
        if self._rooms.get(source.name) is source:
            del self._rooms[source.name]
            self._app[PRESENCE].leave(source, self._user)

    def gone(self, code: int, seconds: float) -> None:
        """The socket is closed; its handshake's line has the same request id, and its path."""
        if self._app[CONFIG].server.access_log:
            line = {"request_id": self._request_id, "code": int(code), "seconds": round(seconds, 4)}
            access.info("socket closed", extra=line)
        self._entry.leave()
        for room in self._rooms.values():
            self._app[PRESENCE].leave(room, self._user)
        self._rooms.clear()

    async def take(self, said: str | bytes) -> None:
        """Does what a frame says, and answers it."""
        ref: object = None
        try:
            if isinstance(said, bytes):
                raise BadRequest("frames are JSON text, not binary")
            frame = parse(said, "frame")
            if not isinstance(frame, dict):
                raise BadRequest("the frame must be a JSON object", param="frame")
            ref = frame.get("ref")
            kind = frame.get("type", "message" if "content" in frame and self.path else None)
            action = FRAMES.get(kind) if isinstance(kind, str) else None
            if action is None:
                raise InvalidField("type", f"must be one of {', '.join(FRAMES)}")
            if self._who is NOBODY and kind not in FIRST:
                raise Unauthorized("authenticate first", code="token_missing")
            if self._limits.requests_per_minute and kind not in FIRST:
                await self._app[LIMITS].take("requests", self._user)
            reply = action(self, frame)
            if isinstance(reply, Awaitable):
                reply = await reply
        except RivuletError as error:
            reply = self._error(error)
        except Exception:
            logger.exception("frame broke", extra={"request_id": self._request_id})
            reply = self._error(RivuletError("internal error"))
        if reply is not None:
            self._reply(reply, ref)

    def _error(self, error: RivuletError) -> JSON:
        """The frame that this error means; with what is a header elsewhere."""
        frame = {"type": "error", **error.body(self._request_id)}
        if error.retry_after is not None:
            frame["retry_after"] = max(1, math.ceil(error.retry_after))
        return frame

    def _room(self, frame: JSON, action: str = "subscribe") -> Room:
        """The room that a frame is about: one that this socket is in, where it may do that."""
        name = Fields(frame, self._limits).text("room", self.path or None, most=128)
        room = self._rooms.get(name)
        if name == f"user:{self._user}" and self._user != "anonymous":
            room = self._app[ROOMS].find(name)
        if room is None or room.log.closed:
            raise NotFound("join the room first", param="room")
        check_room(name, self._who, action)
        return room

    async def authenticate(self, frame: JSON) -> None:
        """The first time it says who it is; then a fresh token of theirs takes the place of one
        that is about to expire.
        """
        token, auth = Fields(frame, self._limits).text("token", "any"), self._app[AUTH]
        who = auth.guest(self._user) if auth.open else auth.identify(token)
        first = self._who is NOBODY
        if not first and who.user != self._user:
            raise Forbidden("the token is another user's", param="token")
        if first:
            await self._entry.rename(who.user)
        self.sink.who = who
        self._reply({"type": "authenticated", "userId": who.user}, frame.get("ref"))
        if first:
            try:
                self.begin(await self.open(who))
            except RivuletError as error:
                self.refuse(error)
        for room in list(self._rooms.values()):
            if not who.may("subscribe", room.name):
                self.sink.send(self._leave(room))

    async def join(self, frame: JSON) -> None:
        fields = Fields(frame, self._limits)
        after = None
        if frame.get("last_event_id") != "":  # which is none, as in a query
            after = fields.text("last_event_id", "", most=128) or None
        name = check_room(fields.text("room", most=128), self._who, "subscribe")
        if name not in self._rooms and len(self._rooms) >= ROOMS_MOST:
            raise InvalidField("room", f"a socket can be in {ROOMS_MOST} rooms")
        self.enter(await self._app[ROOMS].open(name, after), after, ref=frame.get("ref"))

    def leave(self, frame: JSON) -> JSON:
        room = self._room(frame)
        if is_personal(room.name):
            raise InvalidField("room", "every connection is in its own person's room")
        return self._leave(room)

    def _leave(self, room: Room) -> JSON:
        del self._rooms[room.name]
        self.sink.unfollow(room)
        self._app[PRESENCE].leave(room, self._user)
        return {"type": "left", "room": room.name}

    async def message(self, frame: JSON) -> JSON:
        room = self._room(frame, "publish")
        if frame.get("content") is None:
            frame["content"] = frame.get("message")
        fields = Fields(frame, self._limits)
        key = fields.text("idempotency_key", "", most=255)
        data = said(fields, self._user, "message")
        (id,) = await room.publish([("message", data)], key=(self._user, key))
        return {"type": "ack", "id": id, "room": room.name}

    def typing(self, frame: JSON) -> None:
        room = self._room(frame, "publish")
        typing = frame.get("typing", True)
        if not isinstance(typing, bool):
            raise InvalidField("typing", "must be true or false")
        told = {"userId": self._user, "typing": typing}
        event = room.ephemeral("user_typing", told)
        self._app[DELIVERY].broadcast(room, event)
        room.keeper.told(room, event)

    async def generate(self, frame: JSON) -> JSON:
        room, fields = self._room(frame, "generate"), Fields(frame, self._limits)
        model = fields.model()
        if frame.get("messages") is not None:
            question = Question(fields.messages(), "", model, room=room.name)
        else:
            question = Question([], fields.text("message"), model, room=room.name)
        await self._app[LIMITS].take("generations", self._user)
        generation = await begin(self._app, self._who, self._request_id, question)
        return {"type": "ack", "stream_id": generation.id, "room": room.name}

    async def stop(self, frame: JSON) -> JSON:
        stream_id = Fields(frame, self._limits).text("stream_id", most=128)
        generation = await self._app[GENERATIONS].find(stream_id, self._who)
        if generation is None:
            raise NotFound("no such stream", param="stream_id")
        check_stop(generation, self._who)
        generation.stop()
        return {"type": "ack", "stream_id": stream_id}

    def history(self, frame: JSON) -> JSON:
        room = self._room(frame)
        return {"type": "history", "room": room.name, **history(room, frame, self._limits)}

    def presence(self, frame: JSON) -> JSON:
        room = self._room(frame)
        return {"type": "presence", "room": room.name, "members": room.members}

    def ping(self, frame: JSON) -> JSON:
        return {"type": "pong"}


class Echo(Connection):
    """One that hears its own words."""

    async def take(self, said: str | bytes) -> None:
        """Says the same."""
        if isinstance(said, str):
            self.sink.write(text_frame(said.encode()))
        else:
            self.sink.write(text_frame(said, BINARY))


async def serve(request: web.Request) -> web.StreamResponse:
    """GET /ws and /ws/{room}: opens a socket, which runs until either side closes. Whose token does
    not do is told so on it: a browser's page hears of no status.
    """
    config, who, refused = request.app[CONFIG], request[IDENTITY], request.get(REFUSED)
    most, compression = config.limits.frame_bytes, config.delivery.compression
    rooms: list[Room] = []
    connection = Connection(request)
    try:
        if who is not NOBODY:
            rooms = await connection.open(who)
    except (Forbidden, Unavailable) as error:  # perhaps there is no place for its room
        refused = error
    response = await connection.shake(request, most, compression)
    if refused is not None:
        connection.refuse(refused)
    elif who is NOBODY:
        asyncio.get_running_loop().call_later(SAY_WHO, connection.unnamed)
    else:
        connection.begin(rooms)
    return response


async def echo(request: web.Request) -> web.StreamResponse:
    """GET /echo: returns each frame as it came."""
    return await Echo(request).shake(request, request.app[CONFIG].limits.echo_bytes)


Reply = JSON | None
FRAMES: Mapping[str, Callable[[Connection, JSON], Reply | Awaitable[Reply]]] = {
    "authenticate": Connection.authenticate,
    "join": Connection.join,
    "leave": Connection.leave,
    "message": Connection.message,
    "send_message": Connection.message,
    "typing": Connection.typing,
    "user_typing": Connection.typing,
    "generate": Connection.generate,
    "stop": Connection.stop,
    "history": Connection.history,
    "presence": Connection.presence,
    "ping": Connection.ping,
}


def routes() -> list[web.RouteDef]:
    """This surface's routes."""
    return [
        web.get("/ws", serve, allow_head=False),
        web.get("/ws/{room}", serve, allow_head=False),
        web.get("/echo", echo, allow_head=False),
    ]
