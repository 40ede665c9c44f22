"""Every frame that a client may send on a WebSocket, and what comes back (wire.md, section 3).

Frames that are wrong: tests/test_bad_frames.py. Pings: tests/test_pings.py.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from app import build
from handlers.websocket import ROOMS_MOST
from streaming.config import Config
from streaming.delivery import Feed, Sink
from tests.conftest import StartServer
from tests.inside import in_process
from tests.people import joined, members, new_room, on_socket, publish, request
from tests.processes import Server
from tests.raw_socket import TEXT, RawSocket, frame
from tests.readers import connect


def without(told: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name not in names}


# --- coming in ----------------------------------------------------------------------------------


async def test_a_socket_of_one_room_begins_with_joined(demo_server: Server) -> None:
    """Where the room stands, who is here, what was said, what runs: nothing yet but oneself."""
    room = new_room()
    async with on_socket(demo_server.url, f"/ws/{room}", user_id="ann") as ann:
        told = await ann.next()
    position = told.pop("id")
    assert position.endswith("-0")
    assert told == {
        "type": "joined",
        "room": room,
        "recovered": False,
        "members": ["ann"],
        "messages": [],
        "active": [],
    }


async def test_join_answers_joined_with_its_ref(demo_server: Server) -> None:
    """The last messages are in it, each as its `message` frame was."""
    room = new_room()
    async with joined(demo_server.url, room, "ann") as ann, on_socket(demo_server.url) as bob:
        await ann.say(content="Hi")
        said = await ann.hear("message")
        told = await bob.call("join", room=room)
        assert (told["type"], told["room"], told["messages"]) == ("joined", room, [said])
        assert told["id"] == said["id"]


async def test_one_socket_is_in_many_rooms(demo_server: Server) -> None:
    """Each frame says of which room it is; a socket in one room hears nothing of another."""
    rooms = [new_room() for _ in range(20)]
    async with on_socket(demo_server.url, user_id="ann") as ann:
        for room in rooms:
            assert (await ann.call("join", room=room))["room"] == room
        for room in rooms[1::2]:
            assert (await ann.call("leave", room=room))["type"] == "left"
        for room in rooms:
            await publish(demo_server.url, room, {"content": room})
        heard = await ann.so_far()
    assert [(told["room"], told["content"]) for told in heard] == [(r, r) for r in rooms[::2]]


async def test_joining_a_room_leaves_the_others_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the thousandth costs what the first did; leaving likewise."""
    touched: list[str] = []
    for name in ("add", "remove"):
        real = getattr(Feed, name)

        def counted(feed: Feed, sink: Sink, real: Any = real, name: str = name) -> Any:
            touched.append(name)
            return real(feed, sink)

        monkeypatch.setattr(Feed, name, counted)
    async with in_process(build(Config())) as url, on_socket(url) as ann:
        for number in range(50):
            await ann.call("join", room=f"room-{number}")
        await ann.call("join", room="room-0")
        for number in range(50):
            await ann.call("leave", room=f"room-{number}")
    assert touched.count("add") == touched.count("remove") == 51


async def test_what_is_said_with_the_handshake_is_heard(demo_server: Server) -> None:
    """Whole frames, and one that comes half before and half after the answer."""
    async with connect(demo_server.url) as connection:
        ping = frame(TEXT, b'{"type":"ping","ref":1}')
        half = frame(TEXT, b'{"type":"ping","ref":2}')
        shake = "\r\n".join(
            (
                "GET /ws HTTP/1.1",
                f"Host: 127.0.0.1:{demo_server.port}",
                "Upgrade: websocket",
                "Connection: Upgrade",
                "Sec-WebSocket-Version: 13",
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                "\r\n",
            )
        )
        connection.writer.write(shake.encode() + ping + half[:7])
        answer = await connection.reader.readuntil(b"\r\n\r\n")
        # The example of RFC 6455, section 1.3.
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer
        connection.writer.write(half[7:])
        socket = RawSocket(connection, {})
        for ref in (1, 2):
            assert await socket.hear("pong") == {"type": "pong", "ref": ref}


async def test_joining_again_says_joined_again(demo_server: Server) -> None:
    """And each event still comes once."""
    room = new_room()
    async with joined(demo_server.url, room) as ann:
        assert (await ann.call("join", room=room))["type"] == "joined"
        await publish(demo_server.url, room, {"content": "Hi"})
        assert [told["type"] for told in await ann.so_far()] == ["message"]
        assert await members(demo_server.url, room) == ["anonymous"]


async def test_leave_answers_left(demo_server: Server) -> None:
    """After it nothing of the room comes, and nothing may be said there."""
    room = new_room()
    async with joined(demo_server.url, room) as ann:
        told = await ann.call("leave", room=room)
        assert without(told, "ref") == {"type": "left", "room": room}
        await publish(demo_server.url, room, {"content": "Hi"})
        assert await ann.so_far() == []
        assert (await ann.call("message", room=room, content="Hi"))["code"] == "not_found"


async def test_a_socket_for_which_there_is_no_room_is_told_when(server: StartServer) -> None:
    """Where rooms are bounded and all are in use: an error and 1013 on a socket of one room, an
    error in reply to `join`.
    """
    process = server(rooms={"max_rooms": 1})
    async with joined(process.url, "a"):
        async with on_socket(process.url, "/ws/b") as bob:
            assert [told["code"] for told in await bob.rest()] == ["overloaded"]
            assert bob.code == 1013
        async with on_socket(process.url) as bob:
            assert (await bob.call("join", room="b"))["code"] == "overloaded"
    assert not process.log_lines("handler broke")


# --- saying something ---------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["message", "send_message", None])
@pytest.mark.parametrize("field", ["content", "message"])
async def test_message(demo_server: Server, type: str | None, field: str) -> None:
    """`ack` has the id of the event that all get, the sender too. On `/ws/{room}` a frame with
    `content` needs no type.
    """
    if type is None and field == "message":
        field = "content"
    room = new_room()
    async with joined(demo_server.url, room, "ann") as ann, joined(demo_server.url, room) as bob:
        ack = await ann.call(type, **{field: "Hi"}, data={"a": [1, None]})
        assert without(ack, "id", "ref") == {"type": "ack", "room": room}
        told = await bob.hear("message")
        assert without(told, "timestamp") == {
            "type": "message",
            "id": ack["id"],
            "room": room,
            "userId": "ann",
            "content": "Hi",
            "data": {"a": [1, None]},
        }
        assert await ann.hear("message") == told


async def test_a_message_with_a_key_is_said_once(demo_server: Server) -> None:
    """The same `idempotency_key` gives the first id; another body with it is refused."""
    room = new_room()
    async with joined(demo_server.url, room) as ann:
        first = await ann.call("message", content="Hi", idempotency_key="k")
        again = await ann.call("message", content="Hi", idempotency_key="k")
        other = await ann.call("message", content="Ho", idempotency_key="k")
        assert first["id"] == again["id"]
        assert (other["type"], other["param"]) == ("error", "Idempotency-Key")
        _, page = await request(demo_server.url, "GET", f"/api/v1/rooms/{room}/messages")
        assert [message["content"] for message in page["messages"]] == ["Hi"]


@pytest.mark.parametrize("type", ["typing", "user_typing"])
async def test_typing(demo_server: Server, type: str) -> None:
    """Goes to whoever is there now, and is not kept."""
    room = new_room()
    async with joined(demo_server.url, room, "ann") as ann, joined(demo_server.url, room) as bob:
        await ann.say(type, typing=True)
        await ann.say(type, room=room, typing=False)
        for typing in (True, False):
            told = await bob.hear("user_typing")
            wanted = {"type": "user_typing", "room": room, "userId": "ann", "typing": typing}
            assert told == wanted
        assert bob.last_id.endswith("-0")


async def test_history(demo_server: Server) -> None:
    """Pages as by REST, the newest first, oldest first inside."""
    room = new_room()
    async with joined(demo_server.url, room) as ann:
        for number in range(5):
            await ann.say(content=str(number))
        page = await ann.call("history", limit=2)
        assert (page["type"], page["room"]) == ("history", room)
        assert [message["content"] for message in page["messages"]] == ["3", "4"]
        page = await ann.call("history", room=room, before=page["next"], limit=3)
        assert [message["content"] for message in page["messages"]] == ["0", "1", "2"]
        assert page["next"] is None


async def test_presence(demo_server: Server) -> None:
    """Who is here, in order."""
    room = new_room()
    async with joined(demo_server.url, room, "bob") as bob, joined(demo_server.url, room, "ann"):
        told = await bob.call("presence")
        wanted = {"type": "presence", "room": room, "members": ["ann", "bob"]}
        assert without(told, "ref") == wanted


async def test_authenticate(demo_server: Server) -> None:
    """In open mode any token or none: the user is the one of the connection."""
    async with on_socket(demo_server.url, user_id="ann") as ann:
        for more in ({}, {"token": "x"}):
            told = await ann.call("authenticate", **more)
            assert without(told, "ref") == {"type": "authenticated", "userId": "ann"}


@pytest.mark.parametrize("ref", ["a", 7, 1.5, True, ["x"], {"a": {"b": 1}}])
async def test_a_ref_comes_back_as_it_was(demo_server: Server, ref: object) -> None:
    """Whatever JSON it is; without one the reply has none."""
    async with on_socket(demo_server.url) as ann:
        await ann.say("ping", ref=ref)
        await ann.say("ping")
        assert await ann.next() == {"type": "pong", "ref": ref}
        assert await ann.next() == {"type": "pong"}


# --- whose room ---------------------------------------------------------------------------------


async def test_a_deleted_room_takes_no_place(demo_server: Server) -> None:
    """A socket that is in as many rooms as it may can join another for one that was deleted."""
    name = new_room()
    async with on_socket(demo_server.url) as ann:
        for number in range(ROOMS_MOST):
            await ann.call("join", room=f"{name}-{number}")
        assert (await ann.call("join", room=name))["param"] == "room"
        await request(demo_server.url, "DELETE", f"/api/v1/rooms/{name}-7")
        await ann.hear("left", room=f"{name}-7")
        assert (await ann.call("join", room=name))["type"] == "joined"


async def test_everybody_is_in_a_room_of_their_own(demo_server: Server) -> None:
    """Each connection hears what is published to `user:{id}`, also one that is in another room."""
    me = new_room()
    async with (
        on_socket(demo_server.url, user_id=me) as one,
        joined(demo_server.url, new_room(), me) as other,
    ):
        await one.so_far()
        await publish(demo_server.url, f"user:{me}", {"type": "news", "data": {"n": 1}}, me)
        for socket in (one, other):
            told = await socket.hear("news")
            assert (told["room"], told["data"]) == (f"user:{me}", {"n": 1})


async def test_nobody_gets_out_of_their_own_room(demo_server: Server) -> None:
    """It can be neither left nor deleted: what is published there is still heard."""
    me = new_room()
    own = f"user:{me}"
    async with on_socket(demo_server.url, user_id=me) as one:
        assert (await one.call("join", room=own))["type"] == "joined"
        assert (await one.call("leave", room=own))["param"] == "room"
        status, told = await request(demo_server.url, "DELETE", f"/api/v1/rooms/{own}", user=me)
        assert (status, told["error"]["code"]) == (409, "conflict")
        await publish(demo_server.url, own, {"content": "Hi"}, me)
        assert (await one.hear("message"))["content"] == "Hi"


async def test_frames_reach_the_own_room(demo_server: Server) -> None:
    """Which nobody has to join first."""
    me = new_room()
    async with on_socket(demo_server.url, user_id=me) as one:
        assert (await one.call("message", room=f"user:{me}", content="note"))["type"] == "ack"
        assert (await one.hear("message"))["content"] == "note"
        told = await one.call("history", room=f"user:{me}")
        assert [message["content"] for message in told["messages"]] == ["note"]
        assert "own person's room" in (await one.call("leave", room=f"user:{me}"))["message"]
        assert (await one.call("history", room="user:another"))["code"] == "not_found"


async def test_what_was_missed_in_the_own_room_can_be_read(demo_server: Server) -> None:
    """By joining it with the last id."""
    me = new_room()
    async with on_socket(demo_server.url, user_id=me) as one:
        await publish(demo_server.url, f"user:{me}", {"content": "1"}, me)
        first = await one.hear("message")
    await publish(demo_server.url, f"user:{me}", {"content": "2"}, me)
    async with on_socket(demo_server.url, user_id=me) as one:
        told = await one.call("join", room=f"user:{me}", last_event_id=first["id"])
        assert told["recovered"]
        assert (await one.hear("message"))["content"] == "2"


@pytest.mark.parametrize(
    ("room", "stranger"),
    [
        ("user:ann", "bob"),
        ("user:ann:b", "ann"),
        ("user:", "bob"),
        ("conv:ann:c1", "bob"),
        ("conv:a%20b:c1", "a%20b"),
        ("conv:", "bob"),
    ],
)
async def test_anothers_room_is_as_one_that_is_not_there(
    demo_server: Server, room: str, stranger: str
) -> None:
    """A personal room or a conversation is its owner's alone, however their names look alike."""
    async with on_socket(demo_server.url, user_id=stranger) as socket:
        assert (await socket.call("join", room=room))["code"] == "not_found"
    assert (await publish(demo_server.url, room, {"content": "Hi"}, stranger))[0] == 404
    assert await refusal(demo_server.url, room, stranger) == 404


async def refusal(url: str, room: str, user: str = "ann") -> int:
    """The status with which a socket of this room is refused."""
    path = f"/ws/{quote(room, safe='')}?user_id={quote(user)}"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with aiohttp.ClientSession() as session:
            await session.ws_connect(URL(url + path, encoded=True))
    return refused.value.status


@pytest.mark.parametrize("user", ["ann", "a b", "a:b", "ä"])
async def test_a_conversation_can_be_followed_by_its_owner(
    demo_server: Server, http: aiohttp.ClientSession, user: str
) -> None:
    """As the room `conv:{owner}:{id}`, the owner's name percent-encoded."""
    conversation = new_room()
    body = {"message": "Hi", "conversation_id": conversation, "model": "demo:tokens=3"}
    path = f"{demo_server.url}/api/chat/stream"
    quoted = {"ann": "ann", "a b": "a%20b", "a:b": "a%3Ab", "ä": "%C3%A4"}[user]
    async with http.post(path, json=body, params={"user_id": user}) as answer:
        await answer.read()
    async with on_socket(demo_server.url, user_id=user) as socket:
        told = await socket.call("join", room=f"conv:{quoted}:{conversation}")
        assert [message["userId"] for message in told["messages"]] == [user, "assistant"]


# --- the rest -----------------------------------------------------------------------------------


async def test_echo_returns_each_frame_as_it_came(
    demo_server: Server, http: aiohttp.ClientSession
) -> None:
    """Text and binary, empty and large."""
    async with http.ws_connect(f"{demo_server.url}/echo", max_msg_size=0) as socket:
        for text in ("", "Hi", "ü" * 100_000):
            await socket.send_str(text)
            assert await socket.receive_str() == text
        for data in (b"", b"\xff\0", b"x" * 3_000_000):
            await socket.send_bytes(data)
            assert await socket.receive_bytes() == data


async def test_an_error_says_what_is_wrong(demo_server: Server) -> None:
    """In the shape of every error, with the `ref` of the frame."""
    async with joined(demo_server.url, new_room()) as ann:
        told = await ann.call("message", content=7)
        assert told.pop("ref") and told.pop("request_id")
        assert told == {
            "type": "error",
            "code": "invalid_field",
            "message": "content: must be a string",
            "param": "content",
        }


async def test_a_frame_without_type_needs_a_room_of_the_path(demo_server: Server) -> None:
    """On `/ws` it says nothing."""
    async with on_socket(demo_server.url) as ann:
        assert (await ann.call(content="Hi"))["param"] == "type"
        assert (await ann.call("message", content="Hi"))["param"] == "room"


@pytest.mark.parametrize("room", ["a b", "x" * 129, "a\tb"])
async def test_a_bad_room_in_the_path_is_refused_before_the_socket(
    demo_server: Server, room: str
) -> None:
    """With the status of the error."""
    assert await refusal(demo_server.url, room) == 422


async def test_a_plain_request_for_a_socket_is_400(demo_server: Server) -> None:
    """And one that wants another version of the protocol."""
    for path in ("/ws", "/ws/a", "/echo"):
        status, told = await request(demo_server.url, "GET", path)
        assert (status, told["error"]["code"]) == (400, "bad_request")
