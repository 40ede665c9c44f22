"""Rooms: projections next to a log, and the registry that forgets what nobody uses.

What followers make of a room's events is in tests/test_room_cursor.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming import config
from streaming.errors import InvalidField, Unavailable
from streaming.log import Log
from streaming.room import Room
from streaming.rooms import Rooms
from tests.properties import property_test

Said = tuple[str, dict[str, Any]]
IDS = st.sampled_from(["g1", "g2", "g3"])
ENDINGS = ("finished", "failed", "cancelled")
room_events = st.lists(
    st.one_of(
        st.text().map(lambda text: ("message", {"user_id": "u", "content": text})),
        st.text().map(lambda text: ("custom", {"user_id": "u", "content": text})),
        IDS.map(lambda id: ("started", {"stream_id": id, "user_id": "u", "model": "m"})),
        st.tuples(
            st.sampled_from(ENDINGS),
            st.tuples(IDS, st.text()).map(lambda two: {"stream_id": two[0], "content": two[1]}),
        ),
    ),
    max_size=30,
)


def room(name: str = "r", messages: int = 100, **bounds: Any) -> Room:
    return Room(name, config.Rooms(**bounds), messages)


def told(each: Room, events: Sequence[Said]) -> Room:
    """The room after these events; each start comes with a log of its own."""
    for type, data in events:
        if type == "started":
            each.starting[data["stream_id"]] = Log(data)
        each.append(type, data)
    return each


def state(each: Room) -> tuple[list[Said], dict[str, Any]]:
    """The projections: what was said, and the start of each generation that runs."""
    messages = [(event.type, dict(event.data)) for event in each.messages]
    return messages, {id: log.origin for id, log in each.running.items()}


# Projections


def test_messages_are_what_was_said() -> None:
    """By people and by the model, oldest first; and so a model is told of it."""
    conversation = told(
        room(),
        [
            ("message", {"user_id": "u", "content": "Hi"}),
            ("started", {"stream_id": "g1", "user_id": "u", "model": "m"}),
            ("finished", {"stream_id": "g1", "content": "Hello!"}),
            ("custom", {"user_id": "u", "content": "no message"}),
            ("message", {"user_id": "v", "content": "And me?"}),
        ],
    )
    assert [event.id.offset for event in conversation.messages] == [1, 3, 5]
    assert conversation.context() == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "And me?"},
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_said_before_an_ending_was_said(ending: str) -> None:
    """However it ended; an answer without a word is no message."""
    conversation = room()
    conversation.append(ending, {"stream_id": "g1", "content": "Half an ans"})
    conversation.append(ending, {"stream_id": "g2", "content": ""})
    assert conversation.context() == [{"role": "assistant", "content": "Half an ans"}]


def test_running_are_those_between_start_and_end() -> None:
    """Each with its log; any number at once."""
    conversation, first, second = room(), Log({}), Log({})
    conversation.starting |= {"g1": first, "g2": second}
    conversation.append("started", {"stream_id": "g1", "user_id": "u", "model": "m"})
    conversation.append("started", {"stream_id": "g2", "user_id": "v", "model": "m"})
    assert conversation.running == {"g1": first, "g2": second}
    conversation.append("cancelled", {"stream_id": "g1", "content": ""})
    assert conversation.running == {"g2": second}


@property_test
@given(room_events, st.integers(1, 5))
def test_the_projections_are_a_fold_of_the_log(events: list[Said], keep: int) -> None:
    """After each event they are what all events up to it give, however they came: one by one, or
    all of them into a new room.
    """
    live = room(messages=keep)
    for count, said in enumerate(events, 1):
        told(live, [said])
        assert state(live) == expected(events[:count], keep)
    again = told(room(messages=keep), [(e.type, dict(e.data)) for e in live.log.read(0)])
    assert state(again) == state(live)


def expected(events: Sequence[Said], keep: int) -> tuple[list[Said], dict[str, Any]]:
    """The state that the whole list gives, worked out from the list alone."""
    messages = [
        (type, data)
        for type, data in events
        if type == "message" or (type in ENDINGS and data["content"])
    ]
    running: dict[str, Any] = {}
    for type, data in events:
        if type == "started":
            running[data["stream_id"]] = data
        elif type in ENDINGS:
            running.pop(data["stream_id"], None)
    return messages[-keep:], running


published = st.lists(
    st.text().map(lambda text: ("message", {"user_id": "u", "content": text})), max_size=20
)


@property_test
@given(published, st.lists(st.integers(1, 6)), st.integers(1, 5))
def test_any_batching_gives_the_same_room(events: list[Said], sizes: list[int], keep: int) -> None:
    """The same events in batches of any size: the same log, ids in a row, the same projections."""
    whole, parts, rest = room(messages=keep), room(messages=keep), events
    whole.add(events, ("u", ""))
    for size in [*sizes, len(rest)]:
        ids = parts.add(rest[:size], ("u", ""))
        offsets = [int(id.rpartition("-")[2]) for id in ids]
        assert offsets == list(range(parts.log.top - len(ids) + 1, parts.log.top + 1))
        rest = rest[size:]
    assert state(parts) == state(whole) == expected(events, keep)
    assert [e.data for e in parts.log.read(0)] == [e.data for e in whole.log.read(0)]


# Idempotency


SAID: list[Said] = [("message", {"user_id": "u", "content": "Hi"})]


def test_the_same_key_gives_the_first_ids() -> None:
    """And adds nothing; another user's same key is another key, and no key is none."""
    each = room()
    first = each.add(SAID, ("u", "k"))
    assert each.add(SAID, ("u", "k")) == first
    assert each.add(SAID, ("v", "k")) != first
    assert each.add(SAID, ("u", "")) != each.add(SAID, ("u", ""))
    assert each.log.top == 4


def test_a_key_with_another_body_is_refused() -> None:
    """It would hide one of the two; nothing is added."""
    each = room()
    each.add(SAID, ("u", "k"))
    with pytest.raises(InvalidField) as refusal:
        each.add([("message", {"user_id": "u", "content": "Ho"})], ("u", "k"))
    assert (refusal.value.param, each.log.top) == ("Idempotency-Key", 1)


def test_keys_outlive_what_the_log_lets_go_of() -> None:
    """A bounded number of them: the oldest leaves for the newest."""
    each = room(events=2)
    first = each.add(SAID, ("u", "0"))
    for number in range(1, 1000):
        each.add(SAID, ("u", str(number)))
    assert each.add(SAID, ("u", "0")) == first
    each.add(SAID, ("u", "1000"))
    assert each.add(SAID, ("u", "0")) != first


def test_the_projections_outlive_the_trimmed_events() -> None:
    """The log is bounded by the configuration; what it let go of was folded before."""
    small = room(events=2)
    told(small, [("message", {"user_id": "u", "content": str(i)}) for i in range(5)])
    assert [event.data["content"] for event in small.log.read(small.log.tail)] == ["3", "4"]
    assert [message["content"] for message in small.context()] == list("01234")
    assert [event.data["content"] for event in small.history(6, 10)] == ["3", "4"]


def test_a_rooms_events_carry_its_name() -> None:
    """As the origin of its log."""
    assert room("lobby").append("message", {"content": "Hi"}).origin == {"room": "lobby"}


# The registry


class Time:
    """The clock of the rooms: it moves when a test says so."""

    now = 0.0


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("streaming.rooms.time.monotonic", lambda: time.now)
    return time


def registry(**bounds: Any) -> Rooms:
    return Rooms(config.Rooms(**bounds), config.History(messages=7))


def names(rooms: Rooms, *asked: str) -> str:
    return "".join(name for name in asked if rooms.find(name))


def test_a_room_is_made_once() -> None:
    """The same name is the same room; finding makes none."""
    rooms = registry()
    assert rooms.find("a") is None and len(rooms) == 0
    made = rooms.get("a")
    assert rooms.get("a") is rooms.find("a") is made
    assert (made.name, len(rooms), made.messages.maxlen) == ("a", 1, 7)


def test_an_idle_room_is_forgotten(time: Time) -> None:
    """After `idle` seconds without use; getting it and writing to it are use."""
    rooms = registry(idle=10)
    for name in "abc":
        rooms.get(name)
    time.now = 6
    rooms.get("a")
    written = rooms.find("b")
    assert written is not None
    written.append("message", {"content": "Hi"})
    time.now = 12
    rooms.sweep()
    assert names(rooms, *"abc") == "ab"
    time.now = 17
    rooms.sweep()
    assert len(rooms) == 0


def test_a_room_in_use_is_not_forgotten(time: Time) -> None:
    """While a generation runs in it or somebody reads it; after that it is idle like any other."""
    rooms = registry(idle=10)
    busy, read = rooms.get("busy"), rooms.get("read")
    told(busy, [("started", {"stream_id": "g1"})])
    read.log.listeners.append(lambda: None)
    time.now = 100
    rooms.sweep()
    assert len(rooms) == 2
    busy.append("finished", {"stream_id": "g1", "content": ""})
    read.log.listeners.clear()
    rooms.sweep()
    assert rooms.find("busy") is busy and rooms.find("read") is None
    time.now = 111
    rooms.sweep()
    assert len(rooms) == 0


def test_a_room_with_people_in_it_is_not_forgotten(time: Time) -> None:
    """However long nothing is said there; `idle` begins when the last of them leaves."""
    rooms = registry(idle=10)
    rooms.get("a").people["u"] = 1
    time.now = 100
    rooms.sweep()
    assert names(rooms, "a") == "a"


def test_a_deleted_room_is_forgotten() -> None:
    """Its readers are told; the next of its name is another."""
    rooms = registry()
    first = rooms.get("a")
    rooms.end("a", "u")
    assert first.log.closed and first.log.read(0)[-1].type == "left"
    assert rooms.find("a") is None and rooms.get("a") is not first
    rooms.end("b", "u")
    assert rooms.find("b") is None


def test_a_forgotten_room_comes_back_as_a_new_one(time: Time) -> None:
    """With an epoch of its own, so that old positions are told of the gap."""
    rooms = registry(idle=10)
    before = rooms.get("a")
    time.now = 11
    rooms.sweep()
    assert rooms.get("a").log.epoch != before.log.epoch


def test_one_room_too_many_takes_the_place_of_the_one_used_longest_ago(time: Time) -> None:
    """Not of the one made first."""
    rooms = registry(max_rooms=3)
    for name in "abcab":
        time.now += 1
        rooms.get(name)
    time.now += 1
    rooms.get("d")
    assert names(rooms, *"abcd") == "abd"
    first = rooms.find("a")
    assert first is not None
    time.now += 1
    first.append("message", {"content": "Hi"})
    rooms.get("e")
    assert names(rooms, *"abde") == "ade"


def test_rooms_in_use_keep_their_places(time: Time) -> None:
    """Another one goes instead; where all are in use the new one is refused, to come back later."""
    rooms = registry(max_rooms=2)
    told(rooms.get("a"), [("started", {"stream_id": "g1"})])
    rooms.get("b")
    told(rooms.get("c"), [("started", {"stream_id": "g2"})])
    assert names(rooms, *"abc") == "ac"
    with pytest.raises(Unavailable) as refusal:
        rooms.get("d")
    assert (refusal.value.code, refusal.value.retry_after) == ("overloaded", 5)
    assert rooms.get("a") and len(rooms) == 2


def test_a_place_is_found_among_many_rooms_in_use(time: Time) -> None:
    """Wherever it is. Where there is none all are looked at once a second: it takes a while."""
    rooms = registry(max_rooms=1000)
    for number in range(1000):
        rooms.get(f"room{number}").people["ann"] = 1
    with pytest.raises(Unavailable):
        rooms.get("one more")
    rooms.get("room700").people.clear()
    time.now += 1
    assert rooms.get("one more") and rooms.find("room700") is None


@property_test
@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(1, 5))
def test_there_are_never_more_rooms_than_allowed(gets: list[str], most: int) -> None:
    """And the room just asked for is one of them."""
    rooms = registry(max_rooms=most)
    for name in gets:
        assert rooms.get(name) is rooms.find(name)
        assert len(rooms) <= most
