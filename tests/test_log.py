"""Logs and cursors, held against a model: a plain list of what was appended."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.events import Event, Position
from streaming.log import Cursor, FellBehind, Log
from tests.properties import property_test

EPOCH = "epoch_of_this_log"
HEADS: list[dict[str, Any]] = [
    {"part": 0, "kind": "text"},
    {"part": 0, "kind": "code", "language": "py"},
    {"part": 1, "kind": "reasoning"},
]
MAYBE_LIMIT = st.none() | st.integers(0, 40) | st.integers(200, 1000)

Said = tuple[str, dict[str, Any]]  # type and data of one event: what the model is a list of


class Append(NamedTuple):
    type: str
    number: int


class Extend(NamedTuple):
    head: int
    text: str


class Read(NamedTuple):
    """A cursor reads; where there is none of this number yet, it begins at the top."""

    cursor: int
    merge: bool
    limit: int | None


class Close(NamedTuple):
    pass


appends = st.builds(Append, st.sampled_from(["message", "part_started", "delta"]), st.integers(0))
extends = st.builds(Extend, st.integers(0, 2), st.text(max_size=8))
reads = st.builds(Read, st.integers(0, 3), st.booleans(), MAYBE_LIMIT)
# Mostly deltas, as in life; in runs, so that there is something to merge.
runs = st.lists(extends, max_size=6) | st.builds(
    lambda head, texts: [Extend(head, text) for text in texts],
    st.integers(0, 2),
    st.lists(st.text(max_size=8), max_size=12),
)
contents = st.lists(runs | appends.map(lambda one: [one]), max_size=8).map(
    lambda lists: [each for one in lists for each in one]
)


def write(log: Log, model: list[Said], what: Append | Extend) -> None:
    """Into the log, and into the model."""
    if isinstance(what, Append):
        data = {"number": what.number % 1000, "content": "appended"}
        log.append(what.type, data)
        model.append((what.type, data))
    else:
        head = dict(HEADS[what.head])  # equal is enough to be merged
        log.extend(head, what.text)
        model.append(("delta", {**head, "content": what.text}))


def filled(content: Iterable[Append | Extend]) -> tuple[Log, list[Said]]:
    log, model = Log({"stream_id": EPOCH}, epoch=EPOCH), list[Said]()
    for each in content:
        write(log, model, each)
    return log, model


def said(events: Iterable[Event]) -> list[Said]:
    return [(event.type, dict(event.data)) for event in events]


def check(events: list[Event], model: list[Said], after: int, merge: bool) -> int:
    """That these events say exactly what the model does from `after` on; the offset they reach.
    A merged event's text is that of its deltas, end to end, and it has the last one's position.
    """
    for event in events:
        assert event.id.epoch == EPOCH
        assert after < event.id.offset <= len(model)
        assert merge or event.id.offset == after + 1
        covered = model[after : event.id.offset]
        text = "".join(data["content"] for _, data in covered)
        assert (event.type, event.data) == (covered[0][0], {**covered[0][1], "content": text})
        heads = [{k: v for k, v in data.items() if k != "content"} for _, data in covered]
        assert all(head == heads[0] for head in heads)
        assert event.origin == {"stream_id": EPOCH}
        after = event.id.offset
    return after


def bounded(limit: int | None) -> int:
    return 1 << 62 if limit is None else limit


# Reading


@property_test
@given(contents, st.data())
def test_a_read_gives_all_that_came_after(
    content: list[Append | Extend], data: st.DataObject
) -> None:
    """From any offset, merged or not: nothing lost, doubled or reordered."""
    log, model = filled(content)
    after = data.draw(st.integers(0, len(model)))
    for merge in (False, True):
        assert check(log.read(after, merge=merge), model, after, merge) == len(model)
    assert said(log.read(after, merge=False)) == model[after:]


@property_test
@given(contents, st.data())
def test_what_can_be_merged_is(content: list[Append | Extend], data: st.DataObject) -> None:
    """Adjacent deltas of the same part and kind are one event; an appended event stays itself."""
    log, model = filled(content)
    after = data.draw(st.integers(0, len(model)))
    pieces: list[tuple[Any, str]] = []
    for each in content[after:]:
        if isinstance(each, Append):
            pieces.append((None, "appended"))
        elif pieces and pieces[-1][0] == each.head:
            pieces[-1] = (each.head, pieces[-1][1] + each.text)
        else:
            pieces.append((each.head, each.text))
    assert [event.data["content"] for event in log.read(after)] == [text for _, text in pieces]


@property_test
@given(contents, st.lists(st.tuples(st.booleans(), MAYBE_LIMIT), min_size=1), st.data())
def test_reads_with_limits_compose(
    content: list[Append | Extend],
    how: list[tuple[bool, int | None]],
    data: st.DataObject,
) -> None:
    """Read after read with any limits gives what one read gives. Each makes progress, and passes
    its limit by one delta at most.
    """
    log, model = filled(content)
    start = after = data.draw(st.integers(0, len(model)))
    events: list[Event] = []
    turn = 0
    while after < len(model):
        merge, limit = how[turn % len(how)]
        batch = log.read(after, merge=merge, limit=bounded(limit))
        end = check(batch, model, after, merge)
        assert end > after
        texts = [said["content"] for _, said in model[after:end]]
        if limit is not None and len(texts) > 1:
            assert len("".join(texts[:-1]).encode()) <= limit
        events += batch
        after = end
        turn += 1
    assert log.read(after) == []
    assert check(events, model, start, True) == len(model)


@property_test
@given(st.lists(appends | extends | reads | st.just(Close()), max_size=60))
def test_cursors_read_at_their_own_pace(ops: list[Append | Extend | Read | Close]) -> None:
    """Any number of cursors over a log that is being written: each sees everything after its start
    once and in order, however their reads fall between the appends.
    """
    log, model = Log({"stream_id": EPOCH}, epoch=EPOCH), list[Said]()
    cursors: dict[int, Cursor] = {}
    for op in ops:
        match op:
            case Read(number, merge, limit):
                cursor = cursors.setdefault(number, Cursor(log, log.top))
                before = cursor.offset
                events = cursor.read(merge=merge, limit=bounded(limit))
                assert check(events, model, before, merge) == cursor.offset
                assert bool(events) == (before < len(model))
                assert not cursor.ended
            case Append() | Extend():
                write(log, model, op)
            case Close():
                break
    log.close()
    for cursor in cursors.values():
        assert cursor.ended == (cursor.offset == len(model))
        before = cursor.offset
        assert check(cursor.read(), model, before, True) == len(model)
        assert cursor.ended


@property_test
@given(st.lists(st.text()))
def test_any_text_comes_back_as_it_went_in(texts: list[str]) -> None:
    """Whatever its characters take in UTF-8, from every offset."""
    log, _ = filled(Extend(0, text) for text in texts)
    for after in range(len(texts)):
        assert "".join(e.data["content"] for e in log.read(after)) == "".join(texts[after:])


def test_an_event_has_the_time_of_its_append(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged one that of its last delta. A clock that is set back loses nothing."""
    times = iter([1000, 1001, 1007, 1900, 400, 5000])
    monkeypatch.setattr("streaming.log.now_ms", lambda: next(times))
    log = Log({})
    log.append("started", {})
    for text in ("a", "b", "c", "d"):
        log.extend(HEADS[0], text)
    assert [event.time for event in log.read(0)] == [1001, 5000]
    assert [event.time for event in log.read(0, merge=False)] == [1001, 1007, 1900, 1000, 5000]


def test_a_read_event_is_the_readers_own() -> None:
    """What a reader does to the data of a delta, no other reader sees."""
    log, _ = filled([Extend(0, "a")])
    read: Any = log.read(0)[0].data
    read["content"] = read["kind"] = "changed"
    assert said(log.read(0)) == [("delta", {**HEADS[0], "content": "a"})]


# Appending


def test_offsets_count_from_one_without_holes() -> None:
    """Appended events and deltas alike; `append` returns what a reader will see."""
    log = Log({"room": "r"}, epoch=EPOCH)
    assert log.position == (EPOCH, 0)
    first = log.append("message", {"content": "hi"})
    log.extend(HEADS[0], "a")
    assert (first.id, log.position) == ((EPOCH, 1), (EPOCH, 2))
    assert log.read(0)[0] == first


def test_a_log_can_go_on_from_an_offset() -> None:
    """Where the events before it are held elsewhere: they are no part of this log."""
    log = Log({}, epoch=EPOCH, start=41)
    assert log.append("message", {}).id == (EPOCH, 42)
    with pytest.raises(FellBehind):
        log.read(40)
    assert log.holds(Position(EPOCH, 41)) and not log.holds(Position(EPOCH, 40))


def test_each_life_has_an_epoch() -> None:
    """Its own, unless it is given one."""
    assert Log({}).epoch != Log({}).epoch
    assert Position.parse(str(Log({}).position)) is not None
    assert Log({}, epoch=EPOCH).position.epoch == EPOCH


def test_a_closed_log_takes_nothing() -> None:
    """And what it holds can still be read."""
    log, _ = filled([Extend(0, "a")])
    log.close()
    for attempt in (lambda: log.append("message", {}), lambda: log.extend(HEADS[0], "b")):
        with pytest.raises(RuntimeError):
            attempt()
    assert log.top == 1 and len(log.read(0)) == 1


@pytest.mark.parametrize("max_events", [0, 5])
@pytest.mark.parametrize("content", ["\ud800", object()], ids=["surrogate", "object"])
def test_what_json_cannot_say_changes_nothing(max_events: int, content: object) -> None:
    """It is refused before it is part of anything; the log goes on as if it had not been tried."""
    log = Log({}, max_events=max_events)
    with pytest.raises(TypeError):
        log.append("message", {"content": content})
    log.append("message", {"content": "fine"})
    assert (log.top, said(log.read(0))) == (1, [("message", {"content": "fine"})])


def test_a_delta_that_utf8_cannot_say_changes_nothing() -> None:
    """The same for deltas, after which every reader would otherwise break."""
    log, model = filled([Extend(0, "a")])
    with pytest.raises(UnicodeEncodeError):
        log.extend(HEADS[0], "\ud800")
    write(log, model, Extend(0, "b"))
    assert check(log.read(0), model, 0, True) == log.top == 2


def test_listeners_are_told_after_each_change() -> None:
    """When they are called the event can be read, and after the last call the log is closed."""
    log = Log({})
    seen: list[tuple[int, int, bool]] = []
    log.listeners.append(lambda: seen.append((log.top, len(log.read(0, merge=False)), log.closed)))
    log.append("started", {})
    log.extend(HEADS[0], "a")
    log.extend(HEADS[0], "b")
    log.close()
    assert seen == [(1, 1, False), (2, 2, False), (3, 3, False), (3, 3, True)]


def test_size_is_about_the_bytes_held() -> None:
    """Text of deltas as it is in UTF-8, and JSON of other events, in a log without bounds too."""
    log = Log({})
    log.append("message", {"content": "x" * 1000})
    assert 1000 < log.size < 1020
    log.extend(HEADS[0], "é" * 1000)
    assert 3000 < log.size < 3020


# Cost


def test_a_delta_takes_its_text_and_little_more() -> None:
    """10,000 short ones: less than 20 bytes each besides their text."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        log = Log({"stream_id": EPOCH})
        for number in range(10_000):
            log.extend(HEADS[0], f"{number:05} ")
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert log.size == 60_000
    assert taken < 60_000 + 10_000 * 20


def test_a_replay_is_one_event_a_part() -> None:
    """However many deltas it had: a merged read costs the text, not the number of tokens."""
    log, _ = filled([Append("started", 0), *(Extend(0, "token ") for _ in range(10_000))])
    events = log.read(0)
    assert [event.id.offset for event in events] == [1, 10_001]
    assert events[1].data["content"] == "token " * 10_000
