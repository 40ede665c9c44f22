"""nginx as deploy/ configures it: only addresses, paths and what a test names are other ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.processes import ROOT, Process

CONF = (ROOT / "deploy/nginx.conf").read_text()
FRONT = (ROOT / "deploy/nginx-front.conf").read_text()
# The nginx.conf that Debian comes with, as far as it matters here: what a front is included by.
STOCK = """
worker_processes auto;
pid /run/nginx.pid;
error_log /var/log/nginx/error.log notice;
events {
    worker_connections 768;
}
http {
    access_log /var/log/nginx/access.log;
    gzip on;
%s
}
"""
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def edited(text: str, changes: Mapping[str, str]) -> str:
    """`text` with each key of `changes`, which must be in it, replaced."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


class Nginx(Process):
    """One nginx, in the foreground, with files of its own; its listening socket is handed to it, so
    that the port is the system's choice. url: where it listens. targets: URLs it passes on to.
    """

    def __init__(self, directory: Path, conf: str, targets: Sequence[str]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        # nginx leaves a socket that it was handed as it is: in a blocking `accept` a worker that
        # was woken for another's connection would stand still.
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        home = directory / f"nginx-{self.port}"
        home.mkdir()
        self.access = home / "access.log"
        servers = [line for line in conf.splitlines() if re.match(r" +server [\w.-]+:\d+", line)]
        for number, line in enumerate(servers):
            # With fewer targets than servers, the last ones go.
            at = urlsplit(targets[number]).netloc if number < len(targets) else ""
            conf = conf.replace(line, re.sub(r"[\w.-]+:\d+", at, line, count=1) if at else "")
        paths = {
            "listen 80;": f"listen 127.0.0.1:{self.port};",
            "pid /run/nginx.pid;": f"pid {home}/nginx.pid;",
            "/var/log/nginx/access.log": str(self.access),
            "/var/log/nginx/error.log": "stderr",
            "http {": "\n".join(["http {", *(f"{n}_temp_path {home}/{n};" for n in _TEMPORARY)]),
        }
        file = home / "nginx.conf"
        file.write_text(edited(conf, paths))
        nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin") or "nginx"
        # Who runs as root would get workers that may not enter a directory of the tests.
        user = "user root; " if os.geteuid() == 0 else ""
        command = [nginx, "-p", str(home), "-c", str(file), "-g", f"{user}daemon off;"]
        handed = self.listener.fileno()
        super().__init__(command, {**os.environ, "NGINX": f"{handed};"}, (handed,))
        try:
            self.first(self.stderr, lambda line: "start worker process" in line)
        finally:
            self.listener.close()

    def lines(self) -> list[dict[str, Any]]:
        """Its access log: a line a request, written when the request is over."""
        return [json.loads(line) for line in self.access.read_text().splitlines()]


class Way:
    """One nginx before instances, or two in a row. url: where clients connect. nginxes: the one
    before the instances first. With two, the first takes the second's word for who the client is.
    """

    def __init__(
        self,
        directory: Path,
        targets: Sequence[str],
        two: bool,
        changes: Mapping[str, str] | None = None,
        front_changes: Mapping[str, str] | None = None,
    ) -> None:
        """changes: further ones, of the first nginx's file and of that of the one in front."""
        behind = {
            "# set_real_ip_from 192.0.2.1;": "set_real_ip_from 127.0.0.1;",
            "X-Forwarded-Proto $scheme;": "X-Forwarded-Proto $http_x_forwarded_proto;",
        }
        conf = edited(CONF, {**(changes or {}), **(behind if two else {})})
        self.nginxes = [Nginx(directory, conf, targets)]
        if two:
            front = STOCK % edited(FRONT, front_changes or {})
            self.nginxes.append(Nginx(directory, front, [self.nginxes[0].url]))
        self.url = self.nginxes[-1].url

    def stop(self) -> None:
        for nginx in reversed(self.nginxes):
            nginx.stop()
