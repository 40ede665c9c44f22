"""nchan in Debian's nginx: writes its configuration and becomes it."""

import os
import tempfile
from pathlib import Path

from bench.peers.sockets import bound
from bench.upstream import listening


def main() -> None:
    """Hands nginx a socket that listens already (by its variable for upgrades of the binary)."""
    sock = bound()
    sock.set_inheritable(True)
    port = sock.getsockname()[1]
    folder = tempfile.mkdtemp()
    template = Path(__file__).with_name("nchan.conf").read_text()
    config = Path(folder, "nginx.conf")
    config.write_text(template.replace("PORT", str(port)).replace("FOLDER", folder))
    os.environ["NGINX"] = f"{sock.fileno()};"
    os.environ["PATH"] += ":/usr/sbin"
    listening(port)
    os.execvp("nginx", ["nginx", "-p", folder, "-c", str(config)])


if __name__ == "__main__":
    main()
