"""bench/: the fan-out part counts right, with every peer. Nothing here asserts a speed."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import fanout, report, stalled
from bench.audience import Room, Subscriber
from bench.cases import RIVULET, Bench, Outcome
from bench.fanout import PEERS, WEBSOCKET, sample
from bench.plan import Audience
from bench.wire import Units, blocks, chunks, frames, stamps, to_server

MARKS = [b"#t=%020d" % number for number in (1, 22, 333)]
TEXTS = [MARKS[0], b"x" * 200 + MARKS[1], b"y" * 70_000, MARKS[2] + b"\n\n"]


def frame(text: bytes) -> bytes:
    size = len(text)
    if size < 126:
        return bytes((0x81, size)) + text
    wide = size > 0xFFFF
    return bytes((0x81, 126 + wide)) + size.to_bytes(8 if wide else 2, "big") + text


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text), text)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 24, 199, 4096])
@pytest.mark.parametrize(("split", "code"), [(frames, frame), (chunks, chunk), (blocks, bytes)])
def test_what_is_counted_does_not_depend_on_where_the_reads_are_cut(
    size: int, split: Callable[[bytes], Units], code: Callable[[bytes], bytes]
) -> None:
    """Frames, chunks and events come out whole, in order, and nothing is left over."""
    wire = b"".join(map(code, TEXTS))
    text, rest = b"", b""
    for start in range(0, len(wire), size):
        units = split(rest + wire[start : start + size])
        text, rest = text + units[0], units[1]
    assert (text, rest) == (b"".join(TEXTS), b"")
    assert stamps(text) == [1, 22, 333]


def test_a_ping_is_not_text() -> None:
    """It is handed out apart, to be answered, whatever its payload looks like."""
    wire = frame(b"a") + bytes((0x89, len(MARKS[0]))) + MARKS[0] + frame(b"b")
    assert frames(wire) == (b"ab", b"", [MARKS[0]])
    assert to_server(10, b"xyz") == b"\x8a\x83\0\0\0\0xyz"


def heard(*messages: tuple[int, ...]) -> tuple[int, list[int]]:
    """Out of order, and how much each subscriber heard, when they are sent these."""
    room = Room(Audience(port=9))
    listeners = [Subscriber(room, 9) for _ in messages]
    for listener, numbers in zip(listeners, messages, strict=True):
        listener.sock.close()
        listener.take(b"".join(frame(b"#t=%020d" % number) for number in numbers))
    return room.disorder, [listener.heard for listener in listeners]


def test_all_must_hear_the_same_order() -> None:
    """Whoever hears a message first decides; a swap, a hole and a repetition are each seen."""
    assert heard((5, 3, 4), (5, 3, 4)) == (0, [3, 3])
    assert heard((1, 2, 3), (2, 1, 3))[0] > 0
    assert heard((1, 2, 3), (1, 3)) == (1, [3, 2])
    assert heard((1, 2), (1, 1, 2)) == (1, [2, 3])


@pytest.mark.parametrize(
    ("transport", "peer", "rate"),
    [(transport, peer, 0) for transport in PEERS for peer in PEERS[transport]]
    + [(transport, RIVULET, 50) for transport in PEERS],
)
def test_every_message_reaches_everybody(transport: str, peer: str, rate: float) -> None:
    """In every peer, on every transport, at a rate and in a window."""
    plan = Audience(count=7, rate=rate, seconds=0.3, warmup=0.1)
    result = sample(Bench(runs=1, seconds=0.3), transport, peer, plan)
    assert (result.wrong, result.errors) == (0, {})
    assert result.subscribers == 7
    assert result.deliveries == 7 * result.publishes > 0
    assert result.bytes > 200 * result.deliveries
    assert set(result.statuses) <= {"101", "200", "201", "202"}
    assert result.rss_idle > 0
    if rate:
        assert result.latency_ms
        assert result.latency_ms.count == result.deliveries
        assert 10 <= result.publishes <= 16


@pytest.mark.parametrize("transport", PEERS)
def test_those_who_read_hear_all_beside_those_who_do_not(transport: str) -> None:
    """On either transport, and nothing that fills those up is counted as heard."""
    plan = Audience(count=7, rate=50, seconds=0.3, warmup=0.1)
    result = stalled.hear(Bench(runs=1, seconds=0.3), transport, 20, plan)
    assert (result.wrong, result.errors, result.subscribers) == (0, {}, 7)
    assert result.deliveries == 7 * result.publishes > 0


def test_the_report_has_rooms_and_their_targets(tmp_path: Path) -> None:
    """Each run is listed with what was lost, and a target on a number names it."""
    plan = Audience(count=3, seconds=0.2, warmup=0)
    run = sample(Bench(runs=1, seconds=0.2), WEBSOCKET, RIVULET, plan)
    outcome = Outcome(crowds={f"{RIVULET}, {WEBSOCKET}": [run]})
    outcome.add(fanout.DELIVERIES.format(WEBSOCKET), RIVULET, [1234.0])
    outcome.no_less(2500, "connects", 900)
    report.save(tmp_path, "steady", outcome, {"runs": 1})
    page = report.publish(tmp_path)
    assert "| steady | connects: at least 2,500 | 900 | NO |" in page
    assert f"| steady | {RIVULET}, {WEBSOCKET} | 1 | 3 |" in page
