"""What a follower makes of a room's frames is the room itself, however they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming import config
from streaming.events import Event
from streaming.frames import frame
from streaming.log import FellBehind, Log
from streaming.room import Room, RoomCursor
from tests.properties import property_test

KEEP = 4  # messages
IDS = ("g1", "g2", "g3")
ENDINGS = ("finished", "failed", "cancelled")
ENDED = ("stream_end", "stream_error", "stream_cancelled")
ONE, SECOND = {"part": 0, "kind": "text"}, {"part": 1, "kind": "reasoning"}


class World:
    """A room with people and models that speak."""

    def __init__(self, **bounds: Any) -> None:
        self.room = Room("r", config.Rooms(**bounds), KEEP)
        self.texts: dict[str, str] = {}  # of what runs
        self._lives = dict.fromkeys(IDS, 0)  # a stream id is used once

    def do(self, step: tuple[str, str, str]) -> None:
        """`say` a text; `start` and `end` a generation; let it `speak` or `think`."""
        action, id, text = step
        if action == "start" and f"{id}.{self._lives.get(id, 0)}" not in self.texts:
            self._lives[id] += 1
        id = f"{id}.{self._lives.get(id, 0)}"
        running = self.room.running.get(id)
        if action == "say":
            self.room.append("message", {"user_id": "u", "content": text})
        elif action == "start" and running is None:
            log = Log({"stream_id": id, "room": "r"})
            log.append("started", {"model": "m"})
            self.texts[id] = ""
            self.room.starting[id] = log
            self.room.append("started", {"stream_id": id, "user_id": "u", "model": "m"})
        elif action == "speak" and running is not None:
            running.extend(ONE, text)
            self.texts[id] += text
        elif action == "think" and running is not None:
            running.extend(SECOND, text)
        elif action in ENDINGS and running is not None:
            running.append(action, {})
            running.close()
            ending = {"stream_id": id, "user_id": "u", "content": self.texts.pop(id), "usage": {}}
            self.room.append(action, ending)

    def state(self) -> tuple[list[str], dict[str, str]]:
        """The last messages and the texts so far."""
        return [event.data["content"] for event in self.room.messages], self.texts


@dataclass
class Follower:
    """A client: folds frames into the last messages and the texts of what runs."""

    messages: list[str] = field(default_factory=list)
    active: dict[str, str] = field(default_factory=dict)
    seqs: dict[str, int] = field(default_factory=dict)
    position: str | None = None

    def fold(self, events: list[Event]) -> None:
        for event in events:
            told = frame(event)
            if told is not None:
                self._take(told)

    def _take(self, told: dict[str, Any]) -> None:
        match told["type"]:
            case "joined":
                self.messages = [message["content"] for message in told["messages"]]
                self.active = {each["stream_id"]: each["content"] for each in told["active"]}
                self.seqs = {each["stream_id"]: each["seq"] for each in told["active"]}
            case "message":
                self.messages.append(told["content"])
            case "stream_start":
                self.active.setdefault(told["stream_id"], "")
                self.seqs.setdefault(told["stream_id"], 0)
            case "stream_chunk":
                assert told["seq"] > self.seqs[told["stream_id"]]
                self.seqs[told["stream_id"]] = told["seq"]
                self.active[told["stream_id"]] += told["content"]
            case ended if ended in ENDED:
                so_far = self.active.pop(told["stream_id"], None)
                self.seqs.pop(told["stream_id"], None)
                # All of it came before its end; or none, where the end came while it was away.
                assert so_far in (None, "", told["content"])
                self.messages += [told["content"]] if told["content"] else []
        self.position = told.get("id", self.position)

    def state(self) -> tuple[list[str], dict[str, str]]:
        return self.messages[-KEEP:], self.active


text = st.text(min_size=1, max_size=5)
step = st.tuples(
    st.sampled_from(("say", "start", "start", "speak", "speak", "speak", "think", *ENDINGS)),
    st.sampled_from(IDS),
    text,
)
# After each step: nothing, a whole read, or a read of so many bytes, perhaps in single deltas.
reads = st.one_of(st.none(), st.tuples(st.booleans(), st.sampled_from([1, 3, 300, 1 << 62])))


@property_test
@given(st.lists(st.tuples(step, reads), max_size=40), st.integers(0, 20))
def test_any_batching_folds_to_the_same(
    steps: list[tuple[tuple[str, str, str], tuple[bool, int] | None]], joins: int
) -> None:
    """Whoever joins at any time, and reads in pieces of any size, merged or not, has in the end the
    messages and the texts that the room has.
    """
    world, follower = World(), Follower()
    cursor: RoomCursor | None = None
    for number, (each, read) in enumerate(steps):
        world.do(each)
        if number == joins:
            cursor, opening = world.room.join(None)
            follower.fold(opening)
            assert follower.state() == world.state()
        elif cursor is not None and read is not None:
            merge, limit = read
            follower.fold(cursor.read(merge=merge, limit=limit))
    if cursor is not None:
        while cursor.behind:
            follower.fold(cursor.read(limit=300))
        assert follower.state() == world.state()
        assert cursor.read() == []


@property_test
@given(st.lists(st.tuples(step, st.booleans(), st.booleans()), max_size=40))
def test_any_cuts_fold_to_the_same(
    steps: list[tuple[tuple[str, str, str], bool, bool]],
) -> None:
    """So has whoever is cut at any time, comes back with the last position, and is always told that
    it is recovered.
    """
    world, follower = World(), Follower()
    cursor, opening = world.room.join(None)
    follower.fold(opening)
    for each, read, cut in steps:
        world.do(each)
        if read:
            follower.fold(cursor.read(limit=300))
        if cut:
            cursor, opening = world.room.join(follower.position)
            assert [event.type for event in opening] == ["joined"]
            assert opening[0].data["recovered"]
            follower = Follower(position=follower.position)
            follower.fold(opening)
    while cursor.behind:
        follower.fold(cursor.read())
    messages, active = follower.state()
    wanted, running = world.state()
    assert messages == wanted[len(wanted) - len(messages) :] and active == running


@property_test
@given(st.lists(step, max_size=40), st.integers(0, 40))
def test_copies_of_a_cursor_read_the_same(steps: list[tuple[str, str, str]], at: int) -> None:
    """As the feed of a room's live readers counts on."""
    world = World()
    cursor, _ = world.room.join(None)
    for number, each in enumerate(steps):
        world.do(each)
        if number == at:
            cursor.read()
    copy = cursor.copy()
    assert [frame(event) for event in copy.read()] == [frame(event) for event in cursor.read()]
    assert not copy.behind and not cursor.behind


def test_a_cursor_behind_the_tail_is_told() -> None:
    """It never skips what the room has let go of."""
    world = World(events=2)
    cursor, _ = world.room.join(None)
    for number in range(3):
        world.do(("say", "", str(number)))
    with pytest.raises(FellBehind):
        cursor.read()


def test_an_ending_comes_after_all_of_its_text() -> None:
    """Also in a read that is too small for it."""
    world = World()
    cursor, _ = world.room.join(None)
    world.do(("start", "g1", ""))
    cursor.read()
    for number in range(100):
        world.do(("speak", "g1", f"{number} " * 10))
        world.do(("think", "g1", "hm"))
    world.do(("finished", "g1", ""))
    told = []
    while cursor.behind:
        told += [frame(event) for event in cursor.read(limit=50)]
    types = [each["type"] for each in told if each is not None]
    assert types == ["stream_chunk"] * 100 + ["stream_end"]
    assert cursor.logs == [world.room.log], "what has ended is let go of"
