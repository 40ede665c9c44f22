"""What the peers in Python listen on."""

import socket


def bound() -> socket.socket:
    """Listens on a free port of 127.0.0.1.

    With the protocol named, asyncio switches Nagle's algorithm off on what it accepts.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.bind(("127.0.0.1", 0))
    sock.listen(4096)
    return sock
