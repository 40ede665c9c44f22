"""A real Redis Cluster for tests: masters that share the slots, and replicas of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from redis.crc import REDIS_CLUSTER_HASH_SLOTS as SLOTS
from redis.crc import key_slot

from tests.redis_server import RedisServer, free_port

TIMEOUT = 1000  # milliseconds without a word after which a node is lost


class RedisCluster:
    """It works when this returns. options: of each server's configuration."""

    def __init__(
        self, directory: Path, masters: int = 3, replicas: int = 0, **options: str
    ) -> None:
        common = {"cluster-enabled": "yes", "cluster-node-timeout": str(TIMEOUT), **options}
        self.servers = [
            RedisServer(directory / str(n), **{**common, "cluster-port": str(free_port())})
            for n in range(masters + replicas)
        ]
        self.masters = self.servers[:masters]
        self.url = self.address(*self.masters)
        for n, server in enumerate(self.masters):
            first, last = n * SLOTS // masters, (n + 1) * SLOTS // masters - 1
            server.call("CLUSTER", "ADDSLOTSRANGE", first, last)
        for n, server in enumerate(self.servers, 1):
            server.call("CLUSTER", "SET-CONFIG-EPOCH", n)
        for server in self.servers[1:]:
            met = "127.0.0.1", server.port, server.options["cluster-port"]
            self.masters[0].call("CLUSTER", "MEET", *met)
        self._all(lambda server: server.call("CLUSTER", "INFO"), f"known_nodes:{len(self.servers)}")
        for server, master in zip(self.servers[masters:], self.masters, strict=False):
            server.call("CLUSTER", "REPLICATE", master.call("CLUSTER", "MYID"))
        self._all(lambda server: server.call("CLUSTER", "INFO"), "cluster_state:ok")
        for server in self.servers[masters:]:
            while server.call("INFO", "replication").get("master_link_status") != "up":
                time.sleep(0.02)

    def _all(self, said: Callable[[RedisServer], str], word: str) -> None:
        while not all(word in said(server) for server in self.servers):
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends all of them."""
        for server in self.servers:
            server.stop()

    @staticmethod
    def address(*servers: RedisServer) -> str:
        """The address of a cluster that these are of."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)

    def owner(self, name: str) -> RedisServer:
        """The master that has this key or channel, as one that is there says."""
        slot = key_slot(name.encode())
        asked = next(server for server in self.servers if server.process is not None)
        for first, last, (_, port, *_), *_ in asked.call("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(server for server in self.servers if server.port == port)
        raise LookupError(name)

    @contextmanager
    def moving(self, name: str, target: RedisServer) -> Iterator[None]:
        """Moves the slot of this key. Within this some of its keys are here, some there."""
        slot, source = key_slot(name.encode()), self.owner(name)
        ids = source.call("CLUSTER", "MYID"), target.call("CLUSTER", "MYID")
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])

        def move(count: int) -> list[str]:
            keys: list[str] = source.call("CLUSTER", "GETKEYSINSLOT", slot, count)
            for key in keys:
                source.call("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
            return keys

        move(1)
        yield
        while move(100):
            pass
        for server in (target, source, *self.masters):
            server.call("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
