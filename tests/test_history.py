"""Rooms that outlive the process: after an orderly stop nothing has happened, after a crash what
was written is there and positions are told of the gap; and a file that fails harms nobody who is
live.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming import config
from streaming.config import ConfigError, load
from streaming.dialects import ENDINGS
from streaming.errors import InvalidField
from streaming.history import History
from streaming.log import now_ms
from streaming.room import Room
from streaming.rooms import Rooms
from tests.conftest import StartServer
from tests.people import JSON, TRANSPORTS, following, joined, on_socket, publish, request
from tests.processes import ROOT, Server, toml, until
from tests.properties import property_test
from tests.test_recovery import fill
from tests.test_rooms import Said, published, room_events

Start = Callable[..., Server]
_marks = itertools.count()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the history is."""
    return tmp_path / "history.db"


@pytest.fixture
def start(server: StartServer, path: Path) -> Start:
    """Starts a server with that history."""

    def run(**more: Any) -> Server:
        history = {"path": str(path), **more.pop("history", {})}
        return server(history=history, server={"drain": 0.2}, **more)

    return run


def stop(process: Server) -> None:
    """An orderly stop."""
    assert process.stop() == 0
    assert not process.log_lines("Task exception was never retrieved")


def kill(process: Server) -> None:
    process.child.send_signal(signal.SIGKILL)
    process.stop()


async def written(process: Server, path: Path) -> None:
    """Returns when all that was published up to now is in the file. The first mark is in a batch
    with it or a later one; the second in one after that, which begins when the first is whole.
    """
    wal = path.with_name(f"{path.name}-wal")

    def there(mark: str) -> bool:
        return mark.encode() in wal.read_bytes()

    for _ in range(2):
        mark = f"mark number {next(_marks)} "
        await publish(process.url, "marks", {"content": mark})
        await until(partial(there, mark))


def rows(path: Path, query: str) -> list[Any]:
    """What a query of the file gives, while nobody uses it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def epoch_of(id: str) -> str:
    return id.rpartition("-")[0]


async def position(url: str, room: str) -> str:
    async with following(url, room) as ann:
        told = await ann.hear("joined")
    return str(told["id"])


async def is_ready(url: str) -> tuple[int, JSON]:
    status, told = await request(url, "GET", "/ready")
    return status, told


# --- orderly stops ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_reader_resumes_across_a_restart(start: Start, transport: str) -> None:
    """It is cut by the stop, comes back with its last id, and misses nothing: `recovered`, the
    messages up to there, what it had not got yet, and what comes; the epoch is the same.
    """
    first = start()
    async with joined(first.url, "a", "ann", transport) as ann:
        ids = await fill(first.url, "a", 5)
        await ann.hear("message", content="2")
        stop(first)
    second = start()
    await publish(second.url, "a", {"content": "meanwhile"})
    async with following(second.url, "a", transport, after=ids[2]) as ann:
        told = await ann.next()
        assert (told["type"], told["recovered"], told["id"]) == ("joined", True, ids[2])
        assert [message["id"] for message in told["messages"]] == ids[:3]
        heard = await ann.until("message", content="meanwhile")
        await publish(second.url, "a", {"content": "new"})
        heard += await ann.until("message", content="new")
    assert [frame["content"] for frame in heard] == ["3", "4", "meanwhile", "new"]
    assert [frame["id"] for frame in heard] == [f"{epoch_of(ids[0])}-{n}" for n in (4, 5, 6, 7)]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_room_in_which_nothing_was_said(start: Start, transport: str) -> None:
    """Its position is as good after a restart as any other."""
    first = start()
    async with joined(first.url, "a", "ann", transport) as ann:
        stop(first)
    second = start()
    await publish(second.url, "a", {"content": "first of all"})
    async with following(second.url, "a", transport, after=ann.last_id) as ann:
        assert (await ann.next())["recovered"]
        assert (await ann.next())["content"] == "first of all"


async def test_many_restarts(start: Start) -> None:
    """One life of a room through all of them, without a hole."""
    told: list[str] = []
    for number in range(4):
        process = start()
        told += await fill(process.url, "a", 3)
        assert await position(process.url, "a") == told[-1]
        stop(process)
        assert rows(process_path(process), "SELECT clean FROM life") == [(1,)], number
    assert told == [f"{epoch_of(told[0])}-{n}" for n in range(1, 13)]


def process_path(process: Server) -> Path:
    file = Path(process.child.args[3])  # type: ignore[index, arg-type]
    return file.parent / "history.db"


async def test_history_pages_are_the_same(start: Start) -> None:
    """Each message as it was: id, person, text, data, time; pages go on across the restart."""
    first = start()
    for number in range(5):
        body = {"content": f"§ {number}", "data": {"n": [number, None, "é"]}}
        await publish(first.url, "a", body, "ann")
    await publish(first.url, "a", {"type": "custom", "data": {"x": 1}}, "bob")
    before = await request(first.url, "GET", "/api/v1/rooms/a/messages", limit=3)
    stop(first)
    second = start()
    assert await request(second.url, "GET", "/api/v1/rooms/a/messages", limit=3) == before
    query = {"limit": 3, "before": before[1]["next"]}
    _, rest = await request(second.url, "GET", "/api/v1/rooms/a/messages", **query)
    assert [told["content"] for told in rest["messages"]] == ["§ 0", "§ 1"]


async def test_an_answer_that_runs_at_the_stop(start: Start) -> None:
    """Is ended by it, and who comes back is told so, with the text so far; nothing runs."""
    first = start()
    async with joined(first.url, "a", "ann") as ann:
        await ann.call("generate", message="Go on", model="demo:rate=50,tokens=5000")
        began = await ann.hear("stream_start")
        await ann.hear("stream_chunk")
        stop(first)
    second = start()
    async with following(second.url, "a", after=began["id"]) as ann:
        told = await ann.next()
        assert (told["recovered"], told["active"]) == (True, [])
        ending = await ann.next()
    assert (ending["type"], ending["stream_id"]) == ("stream_error", began["stream_id"])
    assert ending["error"]["code"] == "shutting_down" and ending["content"]


async def test_the_last_words_before_a_stop(start: Start) -> None:
    """What is published in the moment of the stop is either refused or kept."""
    first = start()
    kept: list[str] = []

    async def talk() -> None:
        async with joined(first.url, "a", "ann") as ann:
            while (told := await ann.call("message", content="x"))["type"] == "ack":
                kept.append(told["id"])

    talking = asyncio.create_task(talk())
    await until(lambda: len(kept) > 50)
    first.child.send_signal(signal.SIGTERM)
    await asyncio.wait([talking])
    stop(first)
    second = start()
    top = await position(second.url, "a")
    assert epoch_of(top) == epoch_of(kept[-1])
    assert int(top.rpartition("-")[2]) >= len(kept)


# --- crashes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_after_a_crash(start: Start, path: Path, transport: str) -> None:
    """The messages are there, under another epoch; an old position is told of the gap, and a new
    one is as good as any.
    """
    first = start()
    ids = await fill(first.url, "a", 5)
    await written(first, path)
    kill(first)
    second = start()
    async with following(second.url, "a", transport, after=ids[2]) as ann:
        gap, told = await ann.next(), await ann.next()
        assert (gap["type"], gap["requested"]) == ("gap", ids[2])
        assert epoch_of(gap["resumed"]) != epoch_of(ids[0])
        assert (told["type"], told["recovered"]) == ("joined", False)
        assert [message["content"] for message in told["messages"]] == list("01234")
        assert told["messages"][2]["id"] != ids[2]
    async with following(second.url, "a", transport, after=told["messages"][2]["id"]) as ann:
        assert (await ann.next())["recovered"]
        assert [(await ann.next())["content"] for _ in range(2)] == ["3", "4"]


async def test_an_answer_that_ran_at_a_crash(start: Start, path: Path) -> None:
    """Does not run any more: nobody is shown it as running, and who reads from before it is told
    its end.
    """
    first = start()
    async with joined(first.url, "a", "ann") as ann:
        await ann.call("message", content="before")
        ack = await ann.call("generate", message="Go on", model="demo:rate=50,tokens=5000")
        await ann.hear("stream_chunk")
        await written(first, path)
        kill(first)
    second = start()
    async with following(second.url, "a") as ann:
        told = await ann.next()
        assert told["active"] == []
        assert [message["content"] for message in told["messages"]] == ["before", "Go on"]
    async with following(second.url, "a", after=told["messages"][0]["id"]) as ann:
        assert (await ann.next())["active"] == []
        types = [(await ann.next())["type"] for _ in range(2)]
        assert types == ["message", "stream_start"]
        ending = await ann.next()
    assert (ending["type"], ending["stream_id"]) == ("stream_error", ack["stream_id"])
    assert (ending["error"]["code"], ending["content"]) == ("owner_lost", "")


async def test_a_crash_in_the_midst_of_writing(start: Start, path: Path) -> None:
    """Again and again: the file opens, and holds a beginning of what was published, in order."""
    sent: list[str] = []

    async def talk(url: str) -> None:
        with contextlib.suppress(ConnectionError, EOFError):
            async with on_socket(url, "/ws/a") as ann:
                while True:
                    await ann.call("message", content=str(len(sent)))
                    sent.append(str(len(sent)))

    def more_than(count: int) -> bool:
        return len(sent) > count

    for number in range(5):
        process = start()
        _, page = await request(process.url, "GET", "/api/v1/rooms/a/messages", limit=1000)
        there = [told["content"] for told in page["messages"]]
        assert bool(there) is bool(number)
        if there:
            sent[int(there[-1]) + 1 :] = []  # what came after that is lost
            assert there == sent[-1000:]
        enough = len(sent) + 300 + 50 * number
        talking = asyncio.create_task(talk(process.url))
        await written(process, path)
        await until(partial(more_than, enough))
        kill(process)
        await talking


# --- what is remembered -------------------------------------------------------------------------


@pytest.mark.parametrize("end", [stop, kill])
async def test_a_conversation_goes_on(
    server: StartServer, path: Path, upstream: Any, end: Callable[[Server], None]
) -> None:
    """The model is told what was said before the restart, or the crash."""
    from tests.test_conversations import Talk, answered, said

    model = {"name": "up:", "base_url": upstream.base}
    first = server(model=model, history={"path": str(path)})
    name = f"history-{end.__name__}"
    one = await Talk(first, upstream, name).ask("one?")
    await written(first, path)
    end(first)
    second = server(model=model, history={"path": str(path)})
    context = await Talk(second, upstream, name).context("two?")
    assert context == [said("one?"), answered(one.text), said("two?")]


@pytest.mark.parametrize("end", [stop, kill])
async def test_idempotency_keys(start: Start, path: Path, end: Callable[[Server], None]) -> None:
    """The same key gives the first id, after a crash too; with another body it is refused."""
    first = start()
    before = await publish(first.url, "a", {"content": "once"}, "ann", key="k1")
    await written(first, path)
    end(first)
    second = start()
    assert await publish(second.url, "a", {"content": "once"}, "ann", key="k1") == before
    assert (await publish(second.url, "a", {"content": "other"}, "ann", key="k1"))[0] == 422
    _, other = await publish(second.url, "a", {"content": "once"}, "bob", key="k1")
    assert other["id"].endswith("-2")


async def test_a_forgotten_room_is_read_back(start: Start) -> None:
    """Also when it is asked for in the moment in which it was written to: three rooms take turns in
    the place of one.
    """
    process = start(rooms={"max_rooms": 1})
    told: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for number in range(120):
        room = "abc"[number % 3]
        _, answer = await publish(process.url, room, {"content": str(number)})
        told[room].append(answer["id"])
    for room, ids in told.items():
        assert ids == [f"{epoch_of(ids[0])}-{n}" for n in range(1, 41)]
        _, page = await request(process.url, "GET", f"/api/v1/rooms/{room}/messages")
        assert [message["id"] for message in page["messages"]] == ids
    async with following(process.url, "a", "sse", after=told["a"][4]) as ann:
        assert (await ann.next())["recovered"]
        assert [(await ann.next())["id"] for _ in range(35)] == told["a"][5:]


async def test_many_come_to_a_forgotten_room_at_once(start: Start) -> None:
    """It is read once, and all are in the same."""
    process = start(rooms={"max_rooms": 1})
    ids = await fill(process.url, "a", 100)
    await publish(process.url, "b", {"content": "takes its place"})

    async def come(number: int) -> list[str]:
        transport = TRANSPORTS[number % 3]
        async with following(process.url, "a", transport, f"u{number}", after=ids[9]) as person:
            assert (await person.next())["recovered"]
            heard = await person.until("message", id=ids[-1])
            return [frame["id"] for frame in heard if frame["type"] == "message"]

    for heard in await asyncio.gather(*(come(number) for number in range(20))):
        assert heard == ids[10:]


async def test_a_deleted_room_is_gone(start: Start, path: Path) -> None:
    """From the file too, keys and all; what comes after it is another."""
    process = start(rooms={"max_rooms": 1})
    _, first = await publish(process.url, "a", {"content": "secret"}, key="k1")
    await publish(process.url, "b", {"content": "takes its place"})
    assert await request(process.url, "DELETE", "/api/v1/rooms/a") == (200, {"deleted": True})
    assert (await request(process.url, "DELETE", "/api/v1/rooms/a"))[0] == 404
    stop(process)
    for table in ("events", "keys"):
        assert rows(path, f"SELECT * FROM {table} WHERE room = 'a'") == []
    assert rows(path, f"SELECT * FROM rooms WHERE epoch = '{epoch_of(first['id'])}'") == []
    process = start()
    async with following(process.url, "a", after=first["id"]) as ann:
        assert (await ann.next())["type"] == "gap"
        assert (await ann.next())["messages"] == []
    _, second = await publish(process.url, "a", {"content": "secret"}, key="k1")
    assert second["id"] != first["id"]


async def test_a_room_is_deleted_while_it_is_written_to(start: Start, path: Path) -> None:
    """Nothing of it is left, whatever was under way."""
    process = start()

    async def talk() -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            async with joined(process.url, "a", "ann") as ann:
                while (await ann.call("message", content="x"))["type"] == "ack":
                    pass

    for _ in range(10):
        talking = [asyncio.create_task(talk()) for _ in range(3)]
        await fill(process.url, "a", 5)
        assert (await request(process.url, "DELETE", "/api/v1/rooms/a"))[0] == 200
        await asyncio.wait(talking)
    stop(process)
    assert rows(path, "SELECT * FROM rooms WHERE name = 'a'") == []
    assert rows(path, "SELECT * FROM events WHERE room = 'a'") == []


# --- bounds -------------------------------------------------------------------------------------


async def test_the_file_keeps_what_the_room_keeps(start: Start, path: Path) -> None:
    """Its events, and beside them the messages that newcomers and models are told."""
    process = start(rooms={"events": 10}, history={"messages": 5})
    await fill(process.url, "a", 50)
    for number in range(200):
        await publish(
            process.url, "a", {"type": "custom", "content": str(number)}, key=f"k{number}"
        )
    await fill(process.url, "bytes", 3)
    stop(process)
    kept = rows(path, "SELECT offset, type FROM events WHERE room = 'a' ORDER BY offset")
    messages = [(n, "message") for n in range(46, 51)]
    assert kept == messages + [(n, "custom") for n in range(241, 251)]
    process = start(rooms={"events": 10}, history={"messages": 5})
    async with following(process.url, "a") as ann:
        told = await ann.next()
    assert [message["content"] for message in told["messages"]] == [str(n) for n in range(45, 50)]


async def test_the_file_does_not_grow_for_ever(start: Start, path: Path) -> None:
    """Twenty times as much as a room keeps goes through it."""
    process = start(rooms={"bytes": 2**20}, history={"messages": 1})
    for _ in range(20 * 16):
        await publish(process.url, "a", {"content": "x" * 65_000})
    assert size_of(path, "-wal") < 48 * 2**20
    stop(process)
    assert size_of(path) < 4 * 2**20
    assert size_of(path, "-wal") == 0


def size_of(path: Path, beside: str = "") -> int:
    file = path.with_name(path.name + beside)
    return file.stat().st_size if file.exists() else 0


async def test_a_thousand_keys_a_room(start: Start, path: Path) -> None:
    """The file keeps no more than the room."""
    process = start()
    async with joined(process.url, "a", "ann") as ann:
        for number in range(1050):
            await ann.call("message", content="x", idempotency_key=f"k{number}")
    stop(process)
    assert rows(path, "SELECT count(*) FROM keys") == [(1000,)]
    process = start()
    _, told = await publish(process.url, "a", {"content": "x"}, "ann", key="k1049")
    assert told["id"].endswith("-1050")


async def test_rooms_that_nobody_uses_leave_the_file(start: Start, path: Path) -> None:
    """Once all that they hold is older than a room keeps it."""
    process = start()
    await publish(process.url, "a", {"content": "old"}, key="k")
    stop(process)
    await until(lambda: rows(path, "SELECT max(used) FROM rooms") < [(now_ms() - 300,)])
    process = start(rooms={"age": 0.2})
    await publish(process.url, "b", {"content": "new"})
    stop(process)
    assert rows(path, "SELECT name FROM rooms") == [("b",)]
    assert rows(path, "SELECT DISTINCT room FROM events") == [("b",)]
    assert rows(path, "SELECT * FROM keys") == []


# --- a file that fails --------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(process: Server) -> Iterator[None]:
    """Every write of the server's to any file fails, as on a full disk."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)


async def test_a_full_disk(start: Start, path: Path) -> None:
    """Live streams and publishes go on, answers too; it is said once in the log and by `/ready`. A
    room whose rows do not go is not said to be deleted.
    With room again all of it is written, and nobody lost anything; but the file will not say that
    it was closed in order.
    """
    process = start()
    ids = await fill(process.url, "a", 3)
    await fill(process.url, "kept", 3)
    await written(process, path)
    async with joined(process.url, "a", "ann", "sse") as ann, joined(process.url, "a") as bob:
        with full_disk(process):
            await publish(process.url, "a", {"content": "unwritten"})
            await until(lambda: process.log_lines("history failed"))
            assert await is_ready(process.url) == (503, {"status": "history_unavailable"})
            await ann.hear("message", content="unwritten")
            await bob.call("generate", message="Go on", model="demo:rate=100,tokens=50")
            await ann.hear("stream_end")
            await publish(process.url, "another", {"content": "of another room"})
            status, error = await request(process.url, "DELETE", "/api/v1/rooms/kept")
            assert (status, error["error"]["code"]) == (503, "history_unavailable")
        await until(lambda: process.log_lines("history is written again"))
        assert (await is_ready(process.url))[0] == 200
        last = ann.last_id
    assert len(process.log_lines("history failed")) == 1
    assert epoch_of(last) == epoch_of(ids[0])
    stop(process)
    process = start()
    _, page = await request(process.url, "GET", "/api/v1/rooms/a/messages")
    contents = [message["content"] for message in page["messages"]]
    assert contents[:5] == ["0", "1", "2", "unwritten", "Go on"] and len(contents) == 6
    assert epoch_of(page["messages"][0]["id"]) != epoch_of(ids[0])
    _, page = await request(process.url, "GET", "/api/v1/rooms/another/messages")
    assert [message["content"] for message in page["messages"]] == ["of another room"]
    assert (await request(process.url, "DELETE", "/api/v1/rooms/kept"))[0] == 200


async def test_a_room_forgotten_on_a_full_disk(start: Start, path: Path) -> None:
    """What it held is lost, and whoever had read it is told."""
    process = start(rooms={"max_rooms": 1})
    await publish(process.url, "a", {"content": "written"})
    await written(process, path)
    with full_disk(process):
        _, lost = await publish(process.url, "a", {"content": "lost"})
        await publish(process.url, "b", {"content": "takes its place"})
        async with following(process.url, "a", "sse", after=lost["id"]) as ann:
            assert (await ann.next())["type"] == "gap"
            told = await ann.next()
            assert [message["content"] for message in told["messages"]] == ["written"]
    await until(lambda: process.log_lines("history is written again"))
    _, new = await publish(process.url, "a", {"content": "new"})
    assert epoch_of(new["id"]) == epoch_of(told["id"]) != epoch_of(lost["id"])


async def test_a_disk_that_is_full_at_the_stop(start: Start) -> None:
    """The process ends all the same; the next one gives every room another epoch."""
    process = start()
    ids = await fill(process.url, "a", 3)
    with full_disk(process):
        await publish(process.url, "a", {"content": "unwritten"})
        stop(process)
    assert len(process.log_lines("history failed")) == 1
    process = start()
    async with following(process.url, "a", after=ids[0]) as ann:
        assert (await ann.next())["type"] == "gap"


async def test_a_file_that_is_damaged_while_it_is_used(start: Start, path: Path) -> None:
    """A room that cannot be read is not taken for an empty one: 503. What is held goes on; `/ready`
    says so until somebody has looked after the file.
    """
    process = start(rooms={"bytes": 2**20})
    for number in range(60):
        await publish(process.url, f"room{number}", [{"content": "x" * 50_000}] * 4)
    stop(process)
    process = start()
    async with joined(process.url, "live", "ann") as ann:
        damage(path, *range(8192, size_of(path), 4096))
        statuses = set()
        for number in range(60):
            target = f"/api/v1/rooms/room{number}/messages"
            status, told = await request(process.url, "GET", target)
            statuses.add(status)
            assert status == 200 or told["error"]["code"] == "history_unavailable"
        assert 503 in statuses
        assert (await is_ready(process.url))[0] == 503
        assert (await ann.call("message", content="still here"))["type"] == "ack"
        await ann.hear("message", content="still here")
    assert process.stop() == 0
    assert len(process.log_lines("history failed")) == 1


def damage(path: Path, *places: int) -> bytes:
    """Overwrites these pages of the file: what it is then."""
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(b"\x55" * 4096)
    return path.read_bytes()


def refused(directory: Path, history: Path) -> subprocess.CompletedProcess[str]:
    """A start with this history, which must fail."""
    file = directory / "refused.toml"
    file.write_text("\n".join(toml({"history": {"path": str(history)}})))
    command = [sys.executable, "app.py", "--config", str(file), "--port", "0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RIVULET_", "OPENAI_"))}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"history.path: {history} cannot be used: "), line
    return ended


async def test_a_damaged_file_is_refused(start: Start, path: Path, tmp_path: Path) -> None:
    """Wherever the damage is, and left as it is: it may be mended. Moved away, all begins anew."""
    process = start()
    for number in range(20):
        await publish(process.url, f"room{number}", {"content": "x" * 2000})
    stop(process)
    for place in (4096, size_of(path) - 4096, 0):
        damaged = damage(path, place)
        assert "move it and its -wal away" in refused(tmp_path, path).stderr
        assert damage(path) == damaged
    os.rename(path, tmp_path / "moved")
    process = start()
    assert (await position(process.url, "room1")).endswith("-0")


def test_a_file_of_something_else_is_refused(path: Path, tmp_path: Path) -> None:
    """And is not touched."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE accounts (name)")
        db.commit()
    before = path.read_bytes()
    assert "something else" in refused(tmp_path, path).stderr
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A directory, and one that is not there."""
    assert "directory" in refused(tmp_path, tmp_path).stderr.lower()
    assert "No such file" in refused(tmp_path, tmp_path / "no" / "history.db").stderr


async def test_a_file_in_use_is_refused(start: Start, path: Path, tmp_path: Path) -> None:
    """Two processes would each have their own order. The first goes on."""
    process = start()
    ended = await asyncio.to_thread(refused, tmp_path, path)
    assert "another process uses it" in ended.stderr
    await fill(process.url, "a", 3)
    stop(process)


async def test_the_next_process_may_start_before_the_last_has_gone(start: Start) -> None:
    """It waits a moment for the file."""
    first = start()
    ids = await fill(first.url, "a", 3)
    stopping = asyncio.create_task(asyncio.to_thread(stop, first))
    second = await asyncio.to_thread(start)
    await stopping
    assert await position(second.url, "a") == ids[-1]


async def test_the_file_is_for_its_owner_alone(start: Start, path: Path) -> None:
    """What people say is in it."""
    process = start()
    await publish(process.url, "a", {"content": "secret"})
    await written(process, path)
    for each in path.parent.glob("history.db*"):
        assert each.stat().st_mode & 0o077 == 0


# --- off, and with Redis ------------------------------------------------------------------------


def test_with_redis_there_is_no_history_of_ones_own() -> None:
    """Redis keeps the rooms; both keys are named."""
    environ = {"RIVULET_HISTORY__PATH": "h.db", "RIVULET_REDIS__URL": "redis://127.0.0.1"}
    with pytest.raises(ConfigError) as error:
        load(None, environ)
    (problem,) = error.value.problems
    assert problem.startswith("RIVULET_HISTORY__PATH: ") and "redis.url" in problem


def test_off_it_is_not_even_imported() -> None:
    """Who asks for none has none."""
    code = (
        "import sys, app, streaming.config as c; app.build(c.Config());"
        "assert not {'sqlite3', 'streaming.history'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# --- the fold -----------------------------------------------------------------------------------

Step = tuple[list[Said], str, str]  # what is published with which key, and what happens then
steps = st.lists(
    st.tuples(
        st.one_of(room_events, published).map(lambda events: events[:12]),
        st.sampled_from(["", "", "k1", "k2"]),
        st.sampled_from(["", "", "written", "forgotten", "restarted"]),
    ),
    min_size=1,
    max_size=6,
)


@property_test
@given(steps, st.integers(1, 12), st.integers(1, 5))
def test_what_is_read_back_is_what_was_held(all: list[Step], events: int, messages: int) -> None:
    """However it was batched, forgotten and restarted: the same epoch, the same events in the log
    at the same offsets and times, the same messages, the same keys. A start without its end is
    followed by one.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "history.db")
        asyncio.run(read_back(path, all, config.Rooms(events=events), messages))


async def read_back(path: str, all: list[Step], cfg: config.Rooms, messages: int) -> None:
    history = History(path, cfg)
    await history.start()
    rooms = Rooms(cfg, config.History(messages=messages), history)
    for events, key, then in [*all, ([], "", "restarted")]:
        room = await rooms.open("r")
        with contextlib.suppress(InvalidField):  # the key came with another body before
            if events:
                await room.publish(events, ("u", key))
        if then == "written":
            async with history._lock:
                await history._batch()
            continue
        before, running = held(room), running_in(room)
        if then == "forgotten":
            rooms._forget(room)
        elif then == "restarted":
            await history.close()
            history = History(path, cfg)
            await history.start()
            rooms = Rooms(cfg, config.History(messages=messages), history)
        else:
            continue
        again = await rooms.open("r")
        assert again is not room and not again.running
        if room.log.top and not running:
            assert held(again) == before
        elif room.log.top:
            assert again.log.epoch == room.log.epoch
            ended = again.log.read(again.log.top - len(running))
            assert [event.data["stream_id"] for event in ended] == running
            assert {event.type for event in ended} == {"failed"}
            assert held(again)[-2:] == before[-2:]
    await history.close()


def running_in(room: Room) -> list[str]:
    """What its log says has started and not ended."""
    found: dict[str, None] = {}
    for event in room.log.read(room.log.tail):
        if event.type == "started":
            found[event.data["stream_id"]] = None
        elif event.type in ENDINGS:
            found.pop(event.data["stream_id"], None)
    return list(found)


def held(room: Room) -> tuple[Any, ...]:
    """All that a room holds."""
    log = room.log
    messages: Sequence[Any] = [tuple(event) for event in room.messages]
    return log.position, log.tail, [tuple(e) for e in log.read(log.tail)], messages, dict(room.keys)
