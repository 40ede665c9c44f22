"""WebSocket conformance of /echo, by the cases 1 to 7, 9 and 10 of the Autobahn test suite.

Not the suite itself: its fuzzing client runs on CPython 2 alone, which neither Debian nor PyPI has
any more. What it sends in each case, and what it takes for a pass, are written out here again under
its numbers, from its release 25.10.1. Where a case can be OK or NON-STRICT, only the answers of OK
pass, but that invalid UTF-8 need not be failed before its message is whole (6.4). A connection that
is dropped without a close frame fails. 7.1.6 and 7.13, which it calls informational, must end so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pytest

from tests.processes import Server
from tests.raw_socket import BINARY, CLOSE, CONTINUE, PING, PONG, TEXT, RawSocket, dialled
from tests.raw_socket import closing as close
from tests.raw_socket import frame as f

Heard = tuple[int, bytes]
MB = 2**20
WAIT = 0.1  # seconds between parts where the suite waits one: the server answers within a few ms
HELLO = b"Hello, world!"
KOSME = bytes.fromhex("cebae1bdb9cf83cebcceb5")
INVALID = KOSME + b"\xed\xa0\x80edited"
UTF8 = "Hello-µ@ßöäüàá-UTF-8!!".encode()


class Case(NamedTuple):
    """parts: sent one after the other, with a pause between. answers: all that comes. codes: one of
    them is the server's; none where it is we who close first, once everything has come. chop:
    octets in one write; 0 for all.
    """

    parts: list[bytes]
    answers: list[Heard] = []  # noqa: RUF012
    codes: tuple[int, ...] = ()
    chop: int = 0


def fragments(opcode: int, payload: bytes, size: int) -> bytes:
    """One message in fragments of this size."""
    starts = range(0, len(payload), size)
    return b"".join(
        f(opcode if not at else CONTINUE, payload[at : at + size], fin=at == starts[-1])
        for at in starts
    )


def filled(pattern: bytes, size: int) -> bytes:
    return (pattern * (size // len(pattern) + 1))[:size]


def framing() -> Iterator[tuple[str, Case]]:
    """1: framing. Text and binary, each length that is coded in another way."""
    for group, opcode, fill in ((1, TEXT, b"*"), (2, BINARY, b"\xfe")):
        for number, size in enumerate((0, 125, 126, 127, 128, 65535, 65536, 65536), 1):
            chop = 997 if number == 8 else 0
            payload = fill * size
            yield f"1.{group}.{number}", Case([f(opcode, payload)], [(opcode, payload)], chop=chop)


def pings() -> Iterator[tuple[str, Case]]:
    """2: pings and pongs."""
    octets = bytes.fromhex("00fffefdfcfb00ff")
    for number, payload in enumerate((b"", HELLO, octets, b"\xfe" * 125), 1):
        yield f"2.{number}", Case([f(PING, payload)], [(PONG, payload)])
    yield "2.5", Case([f(PING, b"\xfe" * 126)], codes=(1002,))
    yield "2.6", Case([f(PING, b"\xfe" * 125)], [(PONG, b"\xfe" * 125)], chop=1)
    yield "2.7", Case([f(PONG)])
    yield "2.8", Case([f(PONG, b"unsolicited")])
    yield "2.9", Case([f(PONG, b"unsolicited") + f(PING, b"ping")], [(PONG, b"ping")])
    ten = [b"payload-%d" % i for i in range(10)]
    for number, chop in ((10, 0), (11, 1)):
        sent = b"".join(f(PING, payload) for payload in ten)
        yield f"2.{number}", Case([sent], [(PONG, payload) for payload in ten], chop=chop)


def reserved() -> Iterator[tuple[str, Case]]:
    """3: reserved bits; 4: reserved opcodes. What came before is answered, what comes after not."""
    hello, said = f(TEXT, HELLO), [(TEXT, HELLO)]
    yield "3.1", Case([f(TEXT, HELLO, rsv=1)], codes=(1002,))
    for number, rsv, chop in ((2, 2, 0), (4, 4, 1)):
        bad = f(TEXT, HELLO, rsv=rsv)
        yield f"3.{number}", Case([hello + bad + f(PING)], said, codes=(1002,), chop=chop)
    yield "3.3", Case([hello, f(TEXT, HELLO, rsv=3), f(PING)], said, codes=(1002,))
    yield "3.5", Case([f(BINARY, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff", rsv=5)], codes=(1002,))
    yield "3.6", Case([f(BINARY, HELLO, rsv=6)], codes=(1002,))
    yield "3.7", Case([f(CLOSE, rsv=7)], codes=(1002,))
    for group, first in ((1, 3), (2, 11)):
        for number in range(1, 6):
            bad = f(first + number - 1, b"" if number % 2 else b"reserved opcode payload")
            sent = bad if number < 3 else hello + bad + f(PING)
            chop = 1 if number > 3 else 0
            heard = said if number >= 3 else []
            yield f"4.{group}.{number}", Case([sent], heard, codes=(1002,), chop=chop)


def fragmentation() -> Iterator[tuple[str, Case]]:
    """5: fragmentation. As one write, frame by frame, octet by octet."""
    one, two = f(TEXT, b"fragment1", fin=False), f(CONTINUE, b"fragment2")
    whole = (TEXT, b"fragment1fragment2")
    for number, opcode in ((1, PING), (2, PONG)):
        yield f"5.{number}", Case([f(opcode, b"fragment1", fin=False) + two], codes=(1002,))

    def cut(frames: list[bytes], heard: list[Heard], *codes: int) -> Iterator[Case]:
        for parts, chop in (([b"".join(frames)], 0), (frames, 0), ([b"".join(frames)], 1)):
            yield Case(parts, heard, codes, chop)

    ping, pong = f(PING, b"ping payload"), (PONG, b"ping payload")
    alone = [f(CONTINUE, b"non-continuation", fin=fin) for fin in (True, False)]
    groups = (
        (3, cut([one, two], [whole])),
        (6, cut([one, ping, two], [pong, whole])),
        (9, cut([alone[0], f(TEXT, HELLO)], [], 1002)),
        (12, cut([alone[1], f(TEXT, HELLO)], [], 1002)),
    )
    for first, cases in groups:
        for number, case in enumerate(cases, first):
            yield f"5.{number}", case
    rest = f(CONTINUE, b"fragment3", fin=False) + f(TEXT, b"fragment4")
    yield "5.15", Case([one + two + rest], [whole], codes=(1002,))
    for number, fin in ((16, False), (17, True)):
        again = f(CONTINUE, b"fragment1", fin=fin) + f(TEXT, b"fragment2", fin=False)
        yield f"5.{number}", Case([(again + f(CONTINUE, b"fragment3")) * 2], codes=(1002,))
    yield "5.18", Case([one + f(TEXT, b"fragment2")], codes=(1002,))
    five = [f(TEXT if i == 1 else CONTINUE, b"fragment%d" % i, fin=i == 5) for i in range(1, 6)]
    five[2:2], five[5:5] = [f(PING, b"pongme 1!")], [f(PING, b"pongme 2!")]
    message = b"".join(b"fragment%d" % i for i in range(1, 6))
    heard = [(PONG, b"pongme 1!"), (PONG, b"pongme 2!"), (TEXT, message)]
    yield "5.19", Case([b"".join(five[:3]), b"".join(five[3:])], heard)
    yield "5.20", Case(five, heard)


def utf8() -> Iterator[tuple[str, Case]]:
    """6.1 to 6.4: UTF-8 in whole messages, across fragments, and failed as early as may be."""
    yield "6.1.1", Case([f(TEXT)], [(TEXT, b"")])
    for number, middle in ((2, b""), (3, b"middle frame payload")):
        sent = f(TEXT, fin=False) + f(CONTINUE, middle, fin=False) + f(CONTINUE)
        yield f"6.1.{number}", Case([sent], [(TEXT, middle)])
    half = len("Hello-µ@ßöä".encode())
    yield "6.2.1", Case([f(TEXT, UTF8)], [(TEXT, UTF8)])
    yield "6.2.2", Case([fragments(TEXT, UTF8, half)], [(TEXT, UTF8)])
    yield "6.2.3", Case([fragments(TEXT, UTF8, 1)], [(TEXT, UTF8)])
    yield "6.2.4", Case([fragments(TEXT, KOSME, 1)], [(TEXT, KOSME)])
    yield "6.3.1", Case([f(TEXT, INVALID)], codes=(1007,))
    yield "6.3.2", Case([fragments(TEXT, INVALID, 1)], codes=(1007,))
    payload = KOSME + b"\xf4\x90\x80\x80edited"  # wrong from octet 12 on
    for number, ends in ((1, (11, 15)), (2, (12, 13))):
        a, b, c = payload[: ends[0]], payload[ends[0] : ends[1]], payload[ends[1] :]
        frames = [f(TEXT, a, fin=False), f(CONTINUE, b, fin=False), f(CONTINUE, c)]
        yield f"6.4.{number}", Case(frames, codes=(1007,))
        sent = f(TEXT, payload)
        cuts = [len(sent) - len(payload) + end for end in ends]
        pieces = [sent[: cuts[0]], sent[cuts[0] : cuts[1]], sent[cuts[1] :]]
        yield f"6.4.{number + 2}", Case(pieces, codes=(1007,))


def sequences() -> Iterator[list[bytes]]:
    """The octets of 6.5 to 6.23, from Markus Kuhn's UTF-8 decoder stress test."""
    lone = ((0xC0, 0xDF), (0xE0, 0xEF), (0xF0, 0xF7), (0xF8, 0xFB), (0xFC, 0xFD))
    unended = "c0 e080 f08080 f8808080 fc80808080 df efbf f7bfbf fbbfbfbf fdbfbfbfbf"
    surrogates = "eda080edb080 eda080edbfbf edadbfedb080 edadbfedbfbf"
    beyond = [
        bytes([first, second, 0xBF, last])
        for first, second, last in product(range(0xF0, 0xF5), range(0x8F, 0xC0, 16), (0xBE, 0xBF))
        if not (first == 0xF4 and second != 0x8F) and not (first == 0xF0 and second == 0x8F)
    ]
    yield [f"hello{sign}world".encode() for sign in "$¢€\U00024b62"] + [KOSME]
    yield [KOSME[:end] for end in range(1, len(KOSME) + 1)]
    yield _hex("00 c280 e0a080 f0908080")
    yield _hex("f888808080 fc8480808080")
    yield _hex("7f dfbf efbfbf f48fbfbf")
    yield _hex("f7bfbfbf fbbfbfbfbf fdbfbfbfbfbf")
    yield _hex("ed9fbf ee8080 efbfbd f48fbfbf f4908080")
    yield [*_hex("80 bf 80bf 80bf80 80bf80bf 80bf80bf80 80bf80bf80bf"), bytes(range(0x80, 0xBF))]
    yield [b"".join(bytes([octet, 0x20]) for octet in range(*ends)) for ends in lone]
    yield _hex(unended)
    yield [b"".join(_hex(unended))]
    yield _hex("fe ff fefeffff")
    yield _hex("c0af e080af f08080af f8808080af fc80808080af")
    yield _hex("c1bf e09fbf f08fbfbf f887bfbfbf fc83bfbfbfbf")
    yield _hex("c080 e08080 f0808080 f880808080 fc8080808080")
    yield _hex("eda080 edadbf edae80 edafbf edb080 edbe80 edbfbf")
    yield _hex(surrogates) + _hex("edae80edb080 edae80edbfbf edafbfedb080 edafbfedbfbf")
    yield _hex("efbfbe efbfbf") + beyond
    yield _hex("efbfb9 efbfba efbfbb efbfbc efbfbd efbfbe efbfbf")


def _hex(words: str) -> list[bytes]:
    return [bytes.fromhex(word) for word in words.split()]


def stress() -> Iterator[tuple[str, Case]]:
    """6.5 to 6.23: one message each; Python's own decoder says which is valid."""
    for group, payloads in enumerate(sequences(), 5):
        for number, payload in enumerate(payloads, 1):
            try:
                payload.decode()
                case = Case([f(TEXT, payload)], [(TEXT, payload)])
            except UnicodeDecodeError:
                case = Case([f(TEXT, payload)], codes=(1007,))
            yield f"6.{group}.{number}", case


def endings() -> Iterator[tuple[str, Case]]:
    """7: the closing handshake. What comes after a close frame is passed over."""
    normal, done, hello = close(1000), (1000,), f(TEXT, b"Hello World!")
    yield "7.1.1", Case([hello], [(TEXT, b"Hello World!")])
    for number, after in ((2, f(CLOSE)), (3, f(PING)), (4, hello)):
        yield f"7.1.{number}", Case([normal + after], codes=done)
    one, two = f(TEXT, b"fragment1", fin=False), f(CONTINUE, b"fragment2")
    yield "7.1.5", Case([one + normal + two], codes=done)
    large = filled(b"BAsd7&jh23", MB // 4)
    heard = [(TEXT, large), (TEXT, b"Hello World!")]
    yield "7.1.6", Case([f(TEXT, large) + hello + normal + f(PING)], heard, codes=done)
    yield "7.3.1", Case([f(CLOSE)], codes=done)
    yield "7.3.2", Case([f(CLOSE, b"a")], codes=(1002,))
    reasons = ((3, b"", done), (4, b"Hello World!", done), (5, b"*" * 123, done),
               (6, b"*" * 124, (1002,)))  # fmt: skip
    for number, reason, codes in reasons:
        yield f"7.3.{number}", Case([close(1000, reason)], codes=codes)
    yield "7.5.1", Case([close(1000, INVALID)], codes=(1002, 1007))
    legal = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
    for number, code in enumerate(legal, 1):
        yield f"7.7.{number}", Case([close(code)], codes=(1000, code))
    for number, code in enumerate((0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999), 1):
        yield f"7.9.{number}", Case([close(code)], codes=(1002,))
    for number, code in enumerate((5000, 65535), 1):
        yield f"7.13.{number}", Case([close(code)], codes=(1000, 1002, code))


def limits() -> Iterator[tuple[str, Case]]:
    """9.1 to 9.6: large messages, whole, in fragments, in chops; 10.1: fragments of 1300."""
    for kind, opcode, fill in ((0, TEXT, b"BAsd7&jh23"), (1, BINARY, b"\x00\xfe\x23\xfa\xf0")):
        for number, size in enumerate((MB // 16, MB // 4, MB, 4 * MB, 8 * MB, 16 * MB), 1):
            payload = filled(fill, size)
            yield f"9.{1 + kind}.{number}", Case([f(opcode, payload)], [(opcode, payload)])
        payload = b"*" * 4 * MB
        for number, size in enumerate((64 * 4**i for i in range(9)), 1):
            sent = [fragments(opcode, payload, size)]
            yield f"9.{3 + kind}.{number}", Case(sent, [(opcode, payload)])
        payload = filled(fill, MB)
        for number, chop in enumerate((64, 128, 256, 512, 1024, 2048), 1):
            sent = [f(opcode, payload)]
            yield f"9.{5 + kind}.{number}", Case(sent, [(opcode, payload)], chop=chop)
    payload = b"*" * 65536
    yield "10.1.1", Case([fragments(TEXT, payload, 1300)], [(TEXT, payload)])


async def play(url: str, case: Case) -> None:
    """Runs one case: what comes, in what order, how it ends, and that the server ends it."""
    async with dialled(url, "/echo") as socket, asyncio.timeout(60):
        heard = asyncio.create_task(listen(socket, case))
        for number, part in enumerate(case.parts):
            if number:
                await asyncio.sleep(WAIT)
            try:
                await socket.send(part, chop=case.chop)
            except ConnectionError:
                break  # it was closed already
        answers, code = await heard
        assert answers == case.answers
        assert code in (case.codes or (1000,))


async def listen(socket: RawSocket, case: Case) -> tuple[list[Heard], int]:
    """What comes until the server ends the connection, and its close code (1006: none)."""
    heard: list[Heard] = []
    while True:
        if not case.codes and heard == case.answers:
            if not heard:
                await asyncio.sleep(2 * WAIT)  # nothing should come
            await socket.send(close(1000))
        found = await socket.receive()
        if found is None:
            return heard, 1006
        if found.opcode == CLOSE:
            assert await socket.receive() is None, "something came after the close frame"
            return heard, found.code
        assert found.fin and not found.rsv
        heard.append((found.opcode, found.payload))


def table(*cases: Iterator[tuple[str, Case]]) -> dict[str, Case]:
    return {number: case for each in cases for number, case in each}


QUICK = table(framing(), pings(), reserved(), fragmentation(), utf8(), endings())


@pytest.mark.parametrize("number", QUICK)
async def test_a_case_of_framing_utf8_or_closing(demo_server: Server, number: str) -> None:
    """Cases 1 to 6.4 and 7: each is answered, or failed with the right close code."""
    await play(demo_server.url, QUICK[number])


@pytest.mark.parametrize("group", range(5, 24))
async def test_a_group_of_utf8_sequences(demo_server: Server, group: int) -> None:
    """Cases 6.5 to 6.23: valid UTF-8 comes back, anything else is failed with 1007."""
    for number, case in stress():
        if number.startswith(f"6.{group}."):
            await play(demo_server.url, case)


@pytest.mark.parametrize("group", ["9.1", "9.2", "9.3", "9.4", "9.5", "9.6", "10.1"])
async def test_a_group_of_large_messages(demo_server: Server, group: str) -> None:
    """Cases 9.1 to 9.6 and 10.1: up to 16 MB, whole, in fragments, and in small chops."""
    for number, case in limits():
        if number.startswith(f"{group}."):
            await play(demo_server.url, case)


@pytest.mark.parametrize("size", [0, 16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("opcode", [TEXT, BINARY], ids=["9.7", "9.8"])
async def test_a_thousand_round_trips(demo_server: Server, opcode: int, size: int) -> None:
    """Cases 9.7 and 9.8: a message is sent when the one before has come back."""
    payload = b"*" * size
    async with dialled(demo_server.url, "/echo") as socket:
        for _ in range(1000):
            await socket.send(f(opcode, payload))
            found = await socket.receive()
            assert found is not None and found[:2] == (opcode, payload)


def test_no_case_is_missing() -> None:
    """As many as the suite has in each group."""
    every = table(framing(), pings(), reserved(), fragmentation(), utf8(), stress(), endings())
    groups = {"1": 16, "2": 11, "3": 7, "4": 10, "5": 20, "6": 145, "7": 37}
    counts = {group: sum(n.split(".")[0] == group for n in every) for group in groups}
    assert counts == groups
    assert sum(number.startswith("9.") for number in table(limits())) == 42  # and 12 round trips
