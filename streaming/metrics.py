"""What is counted: plain numbers, which whoever is asked for them reads (handlers/metrics.py).

All of it happens in one thread, so nothing here takes a lock. What is counted for each delivery or
token is an attribute of an object that is at hand: it costs an addition, and no lookup.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict

SLOW = 5.0  # seconds after which a request, or a first token, is worth a warning


class Histogram:
    """How many values there were up to each of these bounds, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # in each interval alone; the last is unbounded
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts this value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def _connection() -> Histogram:
    return Histogram(1, 5, 15, 60, 300, 900, 3600, 14400, 86400)


class Metrics:
    """What one application has counted since it was built. What each number means to an operator
    is in the table of handlers/metrics.py.
    """

    def __init__(self) -> None:
        # delivery
        self.encoded = 0  # events, once for all who read alike
        self.deliveries = 0  # events, once for each connection
        self.too_slow = 0
        self.connection_seconds: defaultdict[str, Histogram] = defaultdict(_connection)
        # rooms
        self.published = 0
        self.recoveries = 0
        self.gaps = 0
        # generations
        self.generated = 0  # events in the logs of those that have ended
        self.endings: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token = Histogram(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self.token_gap = Histogram(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        self.upstream_errors: Counter[tuple[str, str]] = Counter()  # by upstream and code
        self.retries = 0
        # requests
        self.refused: Counter[str] = Counter()  # before they were any; by code
        self.requests: Counter[tuple[str, str]] = Counter()  # by route and status
        self.request_seconds = Histogram(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60)
