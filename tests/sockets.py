"""What tests do to sockets beside reading and writing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator


def rst(writer: asyncio.StreamWriter) -> None:
    """Closes with RST instead of FIN; what is not sent yet is lost."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port where connecting neither works nor fails: its queue of connections is full."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port: int = listener.getsockname()[1]
        for _ in range(8):  # more than the kernel lets into a queue of 0
            plug = held.enter_context(socket.socket())
            plug.setblocking(False)
            plug.connect_ex(("127.0.0.1", port))
        yield port


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
