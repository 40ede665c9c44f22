"""What a part of the server costs: the same loads with it and without."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import jwt

from bench.cases import PACED50, RIVULET, SATURATED, TOKENS, Bench, Case, Outcome
from bench.fanout import DELIVERIES, WEBSOCKET, sample
from bench.plan import Audience

FULL, STEADY = f"saturated, {DELIVERIES.format(WEBSOCKET)}", f"20/s, {DELIVERIES.format(WEBSOCKET)}"
STREAMS = {f"saturated, {TOKENS}": SATURATED, f"50/s, {TOKENS}": PACED50}
MEASURES = (FULL, STEADY, *STREAMS)
# What a server with this part needs in its environment, as long as that is open; None for nothing.
Part = Callable[[], AbstractContextManager[Mapping[str, str] | None]]


def costs(
    bench: Bench, peers: Mapping[str, Part], count: int, tokens: Mapping[str, str] | None = None
) -> Outcome:
    """A room of so many WebSockets, and 50 streams of tokens, each with every part, taking turns.
    tokens: with which the load comes in, by peer.
    """
    outcome, tokens = Outcome(), tokens or {}
    full = Audience(count=count, seconds=bench.seconds)
    for measure, plan in {FULL: full, STEADY: replace(full, rate=20.0)}.items():
        for _ in range(bench.runs):
            for peer, part in peers.items():
                with part() as env:
                    at = replace(plan, token=tokens.get(peer, ""))
                    run = sample(bench, WEBSOCKET, RIVULET, at, env)
                outcome.crowds.setdefault(_label(peer, measure), []).append(run)
        for peer in peers:
            heard = outcome.crowds[_label(peer, measure)]
            outcome.add(measure, peer, [run.deliveries_per_cpu for run in heard])
            wrong = max(run.wrong for run in heard)
            outcome.at_most(0, "", f"{peer}: lost, doubled or out of order", wrong)
    for measure, (model, stream) in STREAMS.items():
        for _ in range(bench.runs):
            for peer, part in peers.items():
                with (
                    part() as env,
                    bench.serving(RIVULET, env=env or {}) as (upstream, server),
                ):
                    at_once = replace(stream, token=tokens.get(peer, ""))
                    result = bench.load(upstream, server, model, at_once)
                outcome.runs.setdefault(_label(peer, measure), []).append(result)
        for peer in peers:
            results = outcome.runs[_label(peer, measure)]
            outcome.add(measure, peer, [run.tokens_per_cpu for run in results])
    return outcome


def _label(peer: str, measure: str) -> str:
    return f"{peer}, {measure.partition(',')[0]}"


OPEN, GUARDED = "open, no log", "all doors"
_SECRET = "x" * 32
_DOORS = {
    "RIVULET_AUTH__MODE": "token",
    "RIVULET_AUTH__JWT_SECRET": _SECRET,
    "RIVULET_SERVER__ACCESS_LOG": "true",
    "RIVULET_LIMITS__CONNECTIONS_PER_IP": "100000",
    "RIVULET_LIMITS__CONNECTIONS_PER_USER": "100000",
    "RIVULET_LIMITS__RUNNING_PER_USER": "100000",
    "RIVULET_LIMITS__REQUESTS_PER_MINUTE": "1000000",
    "RIVULET_LIMITS__GENERATIONS_PER_MINUTE": "1000000",
}


def guards() -> AbstractContextManager[Mapping[str, str]]:
    """The part that is all doors."""
    return nullcontext(_DOORS)


def token() -> str:
    """That of a person who comes in through them."""
    return jwt.encode({"sub": "anonymous", "exp": time.time() + 86400}, _SECRET)


def doors(bench: Bench, count: int = 1000) -> Outcome:
    """All doors on (JWT, limits, the log), beside open mode without limits and log."""
    outcome = costs(bench, {OPEN: nullcontext, GUARDED: guards}, count, {GUARDED: token()})
    for measure in MEASURES:
        outcome.at_least(0.9, measure, OPEN, GUARDED)
    return outcome


DOORS: dict[str, Case] = {"doors": doors}
