"""WebSocket: many rooms on one socket, or one by its path; frames are JSON text.

Each frame of a client is a row of FRAMES, at the end of the file. A frame that is wrong gets an
`error` frame, and the connection stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import WSCloseCode, WSMsgType, web

from handlers.chat import Question, begin
from handlers.keys import CONFIG, DELIVERY, GENERATIONS, PRESENCE, REQUEST_ID, ROOMS, USER
from handlers.reading import Fields, last_event_id, parse
from handlers.rooms import check_room, history, is_personal, said
from streaming.errors import BadRequest, InvalidField, NotFound, RivuletError
from streaming.events import JSON
from streaming.rooms import Room
from streaming.sockets import LINGER, SocketSink, open_socket

access = logging.getLogger("rivulet.access")
logger = logging.getLogger("rivulet.websocket")

ROOMS_MOST = 1000  # on one socket


class Connection:
    """One client on one socket: who it is, and where."""

    __slots__ = ("_app", "_limits", "_own", "_request_id", "_rooms", "_user", "sink")

    def __init__(self, request: web.Request, sink: SocketSink) -> None:
        self.sink = sink
        self._app = request.app
        self._user = request[USER]
        self._request_id = request[REQUEST_ID]
        self._limits = request.app[CONFIG].limits
        self._rooms: dict[str, Room] = {}
        self._own = ""  # the room of the path

    def enter(
        self, room: Room, after: str | None, *, own: bool = False, ref: object = None
    ) -> None:
        """Comes into a room that is open, and is told where it stands."""
        before = self._rooms.get(room.name)
        if room is not before:
            self._app[PRESENCE].enter(room, self._user)
            self._rooms[room.name] = room
            if before is not None:  # it was deleted
                self._app[PRESENCE].leave(before, self._user)
        self._own = room.name if own else self._own
        cursor, opening = room.join(after)
        frames = [item for event in opening for item in self.sink.encoder.dialect.say(event) or ()]
        if ref is not None:
            frames[-1]["ref"] = ref
        for frame in frames:
            self.sink.send(frame)
        self.sink.follow(cursor)

    def gone(self, code: int, seconds: float) -> None:
        """The socket is closed; its handshake's line has the same request id, and its path."""
        if self._app[CONFIG].server.access_log:
            line = {"request_id": self._request_id, "code": int(code), "seconds": round(seconds, 4)}
            access.info("socket closed", extra=line)
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
            kind = frame.get("type", "message" if "content" in frame and self._own else None)
            action = FRAMES.get(kind) if isinstance(kind, str) else None
            if action is None:
                raise InvalidField("type", f"must be one of {', '.join(FRAMES)}")
            reply = action(self, frame)
            if isinstance(reply, Awaitable):
                reply = await reply
        except RivuletError as error:
            reply = {"type": "error", **error.body(self._request_id)}
        except Exception:
            logger.exception("frame broke", extra={"request_id": self._request_id})
            reply = {"type": "error", **RivuletError("internal error").body(self._request_id)}
        if reply is not None:
            self.sink.send(reply if ref is None else {**reply, "ref": ref})

    def _room(self, frame: JSON) -> Room:
        """The room that a frame is about: one that this socket is in."""
        name = Fields(frame, self._limits).text("room", self._own or None, most=128)
        room = self._rooms.get(name)
        if room is None or room.log.closed:
            raise NotFound("join the room first", param="room")
        return room

    def authenticate(self, frame: JSON) -> JSON:
        Fields(frame, self._limits).text("token", "any")
        return {"type": "authenticated", "userId": self._user}

    async def join(self, frame: JSON) -> None:
        fields = Fields(frame, self._limits)
        after = fields.text("last_event_id", "", most=128) or None
        name = check_room(fields.text("room", most=128), self._user)
        if name not in self._rooms and len(self._rooms) >= ROOMS_MOST:
            raise InvalidField("room", f"a socket can be in {ROOMS_MOST} rooms")
        self.enter(await self._app[ROOMS].open(name, after), after, ref=frame.get("ref"))

    def leave(self, frame: JSON) -> JSON:
        room = self._room(frame)
        if is_personal(room.name):
            raise InvalidField("room", "every connection is in its own person's room")
        del self._rooms[room.name]
        self.sink.unfollow(room)
        self._app[PRESENCE].leave(room, self._user)
        return {"type": "left", "room": room.name}

    async def message(self, frame: JSON) -> JSON:
        room, fields = self._room(frame), dict(frame)
        if fields.get("content") is None and "message" in fields:
            fields["content"] = fields["message"]
        key = Fields(frame, self._limits).text("idempotency_key", "", most=255)
        data = said(Fields(fields, self._limits), self._user, "message")
        (id,) = await room.publish([("message", data)], key=(self._user, key))
        return {"type": "ack", "id": id, "room": room.name}

    def typing(self, frame: JSON) -> None:
        room = self._room(frame)
        typing = frame.get("typing", True)
        if not isinstance(typing, bool):
            raise InvalidField("typing", "must be true or false")
        told = {"userId": self._user, "typing": typing}
        event = room.ephemeral("user_typing", told)
        self._app[DELIVERY].broadcast(room, event)
        room.keeper.told(room, event)

    async def generate(self, frame: JSON) -> JSON:
        room, fields = self._room(frame), Fields(frame, self._limits)
        model = fields.text("model", "", most=512)
        if frame.get("messages") is not None:
            question = Question(fields.messages(), "", model, room=room.name)
        else:
            question = Question([], fields.text("message"), model, room=room.name)
        generation = await begin(self._app, self._user, self._request_id, question)
        return {"type": "ack", "stream_id": generation.id, "room": room.name}

    async def stop(self, frame: JSON) -> JSON:
        stream_id = Fields(frame, self._limits).text("stream_id", most=128)
        generation = await self._app[GENERATIONS].find(stream_id, self._user)
        if generation is None:
            raise NotFound("no such stream", param="stream_id")
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


async def serve(request: web.Request) -> web.StreamResponse:
    """GET /ws and /ws/{room}: opens a socket, which runs until either side closes."""
    config, user, own = request.app[CONFIG], request[USER], request.match_info.get("room")
    if own is not None:
        check_room(own, user)
    most, compression = config.limits.frame_bytes, config.delivery.compression
    personal = room = refused = None
    try:
        if user != "anonymous":
            personal = await request.app[ROOMS].open(f"user:{user}")
        if own is not None:
            room = await request.app[ROOMS].open(own, last_event_id(request))
    except RivuletError as error:  # there is no place for its room, or it cannot be read now
        refused = error
    sink, response = await open_socket(request.app[DELIVERY], request, most, compression)
    sink.listener = connection = Connection(request, sink)
    if refused is not None:
        sink.close(WSCloseCode.TRY_AGAIN_LATER, refused.message)
        return response
    if personal is not None:
        # Nothing is said of it: whoever is in it hears what comes.
        sink.follow(personal.join(None)[0])
    if room is not None:
        connection.enter(room, last_event_id(request), own=True)
    return response


async def echo(request: web.Request) -> web.WebSocketResponse:
    """GET /echo: returns each frame as it came."""
    limits = request.app[CONFIG].limits
    response = web.WebSocketResponse(
        compress=False, autoclose=False, max_msg_size=limits.echo_bytes
    )
    await response.prepare(request)
    async for received in response:
        if received.type is WSMsgType.TEXT:
            await response.send_str(received.data)
        elif received.type is WSMsgType.BINARY:
            await response.send_bytes(received.data)
        elif received.type is WSMsgType.ERROR:
            await _linger(request)
    await _goodbye(response)
    return response


async def _goodbye(response: web.WebSocketResponse) -> None:
    """Answers a client that closes. 1006 must not be sent (RFC 6455, section 7.4.1), and is the one
    such code that aiohttp takes.
    """
    wrong = response.close_code == WSCloseCode.ABNORMAL_CLOSURE
    await response.close(code=WSCloseCode.PROTOCOL_ERROR if wrong else WSCloseCode.OK, drain=False)


async def _linger(request: web.Request) -> None:
    """After a frame that aiohttp has refused with a close code: reads on for a moment, past it. A
    socket that is closed with bytes unread is reset, and the close frame can be lost in that.
    """
    raw = request.transport.get_extra_info("socket") if request.transport is not None else None
    if raw is not None and raw.fileno() >= 0:
        held = socket.socket(fileno=os.dup(raw.fileno()))
        await asyncio.shield(_read_on(held))  # it goes on when aiohttp has closed


async def _read_on(held: socket.socket) -> None:
    held.setblocking(False)
    with held, contextlib.suppress(OSError, TimeoutError):
        held.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(LINGER):
            while await asyncio.get_running_loop().sock_recv(held, 65536):
                pass


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
