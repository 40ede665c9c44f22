"""A Redis for the cases with a bridge: keeps nothing on disk, and says where it listens."""

import socket
import subprocess
import time

from bench.peers.sockets import bound
from bench.upstream import listening


def main() -> None:
    """Runs it on a free port of 127.0.0.1 until it ends."""
    with bound() as sock:
        port: int = sock.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--loglevel", "warning"]
    redis = subprocess.Popen(["redis-server", "--port", str(port), *options])
    while redis.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.02)
        else:
            listening(port)
            redis.wait()


if __name__ == "__main__":
    main()
