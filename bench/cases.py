"""What is measured: the peers, the cases, and what each case is to reach."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from bench import replay
from bench.measure import Cores, Server, run_load, start
from bench.plan import Heard, Plan, Result, Spread

PATH = "/api/v1/ai/generate/stream"
EVENTS = "/api/v1/streams/{id}/events?dialect=content"

RIVULET, FASTAPI, RELAY, DIRECT = "Rivulet", "FastAPI", "pass-through", "upstream direct"
PEERS = (RIVULET, FASTAPI, RELAY)
_MODULES = {FASTAPI: "bench.fastapi_service", RELAY: "bench.passthrough"}


@dataclass(frozen=True)
class Value:
    """One measure of one peer: the median of its runs, the lowest and the highest."""

    measure: str
    peer: str
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, measure: str, peer: str, runs: Sequence[float]) -> "Value":
        return cls(measure, peer, statistics.median(runs), min(runs), max(runs))


@dataclass(frozen=True)
class Target:
    """What is to be reached, and what was."""

    wanted: str
    measured: str
    reached: bool


@dataclass
class Outcome:
    """Everything a case found out."""

    values: list[Value] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    runs: dict[str, list[Result]] = field(default_factory=dict)
    crowds: dict[str, list[Heard]] = field(default_factory=dict)

    def value(self, measure: str, peer: str) -> float:
        """The median of a measure already added."""
        return next(v.median for v in self.values if (v.measure, v.peer) == (measure, peer))

    def add(self, measure: str, peer: str, runs: Sequence[float]) -> float:
        """Adds a measure's runs and returns their median."""
        self.values.append(Value.of(measure, peer, runs))
        return self.values[-1].median

    def at_least(self, times: float, measure: str, peer: str, ours: str = RIVULET) -> None:
        """Wants our measure to be so many times the peer's."""
        ratio = self.value(measure, ours) / self.value(measure, peer)
        wanted = f"at least {times:.3g} x {peer}'s {measure}"
        self.targets.append(Target(wanted, f"{ratio:.2f} x", ratio >= times))

    def at_most(self, most: float, unit: str, what: str, measured: float) -> None:
        """Wants a number of ours to stay within a bound."""
        wanted = f"{what}: at most {most:.4g} {unit}".strip()
        self.targets.append(Target(wanted, f"{measured:.3g} {unit}".strip(), measured <= most))

    def no_less(self, least: float, what: str, measured: float) -> None:
        """Wants a number of ours to reach a bound."""
        self.targets.append(
            Target(f"{what}: at least {least:,.0f}", f"{measured:,.0f}", measured >= least)
        )


@dataclass
class Bench:
    """Starts an upstream and a peer for each sample, and keeps the settings of all samples."""

    runs: int
    seconds: float
    cores: Cores = field(default_factory=Cores.here)

    @contextmanager
    def serving(
        self, peer: str, loop: str = "", env: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Server, Server]]:
        """A fresh upstream and, in front of it, a fresh server: both, in this order.

        `loop` is Rivulet's event loop; by default the one it is configured with. env: more of its
        environment.
        """
        with start(["-m", "bench.upstream"], self.cores.upstream, {}) as upstream:
            url = f"http://127.0.0.1:{upstream.port}/v1"
            more = {**(env or {}), **({"RIVULET_SERVER__LOOP": loop} if loop else {})}
            if peer == DIRECT:
                yield upstream, upstream
                return
            if peer == RIVULET:
                arguments = ["app.py", "--port", "0"]
                more = {
                    "RIVULET_MODEL__BASE_URL": url,
                    "RIVULET_MODEL__API_KEY": "x",
                    "RIVULET_MODEL__NAME": "fake:k=1",
                    "RIVULET_SERVER__ACCESS_LOG": "false",  # the peers have none either
                    **more,
                }
            else:
                arguments = ["-m", _MODULES[peer], "--upstream", url]
            with start(arguments, self.cores.server, more) as server:
                yield upstream, server

    def load(
        self, upstream: Server, server: Server, model: str, plan: Plan, seconds: float = 0
    ) -> Result:
        """One run of the load against the server, each request asking for this model."""
        body = f'{{"prompt":"hi","model":"{model}","stream":true}}'
        full = replace(
            plan,
            port=server.port,
            path=PATH,
            body=body,
            seconds=seconds or self.seconds,
            pid=server.pid,
            helper=upstream.pid if upstream.pid != server.pid else 0,
        )
        return Result.parse(run_load("bench.load", full, self.cores.load))

    def sample(self, peer: str, model: str, plan: Plan, loop: str = "") -> Result:
        """One run against a fresh server of this peer."""
        with self.serving(peer, loop) as (upstream, server):
            return self.load(upstream, server, model, plan)

    def side_by_side(self, peers: Sequence[str], model: str, plan: Plan) -> dict[str, list[Result]]:
        """All runs of all peers, taking turns, so that a slow minute is everybody's."""
        found: dict[str, list[Result]] = {peer: [] for peer in peers}
        for _ in range(self.runs):
            for peer in peers:
                found[peer].append(self.sample(peer, model, plan))
        return found


Case = Callable[[Bench], Outcome]

TOKENS = "tokens per CPU-second"
ANSWERS = "answers per CPU-second"
_EXTRA = "CPU us an extra reader and token at {}/s"
SATURATED = ("fake:k=1000:r=0:t=1", Plan(streams=50, expect=1000))
PACED50 = ("fake:k=100:r=50:t=1", Plan(streams=50, expect=100, clock=True))
PACED150 = ("fake:k=300:r=150:t=1", Plan(streams=50, expect=300, clock=True))


def _throughput(bench: Bench, model: str, plan: Plan) -> Outcome:
    outcome = Outcome(runs=bench.side_by_side(PEERS, model, plan))
    for peer, runs in outcome.runs.items():
        outcome.add(TOKENS, peer, [run.tokens_per_cpu for run in runs])
    return outcome


def saturated(bench: Bench) -> Outcome:
    """50 streams of 1,000 tokens, the upstream as fast as it goes."""
    outcome = _throughput(bench, *SATURATED)
    outcome.at_least(25, TOKENS, FASTAPI)
    outcome.at_least(1 / 3, TOKENS, RELAY)
    return outcome


def paced50(bench: Bench) -> Outcome:
    """50 streams of 50 tokens a second, answers of two seconds."""
    outcome = _throughput(bench, *PACED50)
    outcome.at_least(3.5, TOKENS, FASTAPI)
    outcome.at_least(0.75, TOKENS, RELAY)
    return outcome


def paced150(bench: Bench) -> Outcome:
    """50 streams of 150 tokens a second, answers of two seconds."""
    outcome = _throughput(bench, *PACED150)
    outcome.at_least(1, TOKENS, RELAY)
    return outcome


def short(bench: Bench) -> Outcome:
    """Answers of one token, 50 at once, asked for again as they end."""
    runs = bench.side_by_side(PEERS, "fake:k=1:r=0:t=1", Plan(streams=50, expect=1))
    outcome = Outcome(runs=runs)
    for peer, results in runs.items():
        outcome.add(ANSWERS, peer, [run.answers_per_cpu for run in results])
    outcome.at_least(2.5, ANSWERS, FASTAPI)
    return outcome


def ttft(bench: Bench) -> Outcome:
    """Time to first token at 50 streams of 50 tokens a second, above the upstream's own."""
    plan = Plan(streams=50, expect=50, clock=True)
    runs = bench.side_by_side((*PEERS, DIRECT), "fake:k=50:r=50:t=1", plan)
    outcome = Outcome(runs=runs)

    def firsts(peer: str, pick: Callable[[Spread], float]) -> list[float]:
        return [pick(run.first_ms) for run in runs[peer] if run.first_ms]

    picks: tuple[tuple[str, float, Callable[[Spread], float]], ...] = (
        ("p50", 5, lambda spread: spread.p50),
        ("p99", 20, lambda spread: spread.p99),
    )
    for name, most, pick in picks:
        measure = f"time to first token, {name}, ms"
        direct = outcome.add(measure, DIRECT, firsts(DIRECT, pick))
        for peer in PEERS:
            outcome.add(measure, peer, firsts(peer, pick))
        added = outcome.value(measure, RIVULET) - direct
        outcome.at_most(most, "ms", f"added time to first token, {name}", added)
    return outcome


def memory(bench: Bench) -> Outcome:
    """Growth of resident memory at 500 running streams of 50 tokens a second. The tokens are words:
    a clock in each would make a text of four times the bytes, which every stream holds.
    """
    streams, ramp = 500, 2.0
    tokens = round(50 * (ramp + bench.seconds + 30))  # none ends while it is measured
    plan = Plan(streams=streams, ramp=ramp)
    outcome = Outcome(runs={peer: [] for peer in PEERS})
    for _ in range(bench.runs):
        for peer in PEERS:
            with bench.serving(peer) as (upstream, server):
                bench.load(upstream, server, "fake:k=1", Plan(streams=5), 0.2)  # its imports
                model = f"fake:k={tokens}:r=50"
                outcome.runs[peer].append(bench.load(upstream, server, model, plan))
    measure = "KiB a running stream"
    for peer, runs in outcome.runs.items():
        # A peer that cannot keep up has not begun to answer all of them.
        running = [run.statuses.get("200", 0) or 1 for run in runs]
        grown = [
            (run.rss_peak - run.rss_before) / 1024 / count
            for run, count in zip(runs, running, strict=True)
        ]
        outcome.add(measure, peer, grown)
    outcome.at_most(40, "KiB", "memory per running stream", outcome.value(measure, RIVULET))
    return outcome


def _extra_reader(bench: Bench, outcome: Outcome, rate: int, loop: str = "") -> float:
    """Measures one more reader's cost a token; returns upstream calls a generation."""
    readers = 1000
    seconds = bench.seconds + 6  # opening 1,000 readers takes some of it
    tokens = round(rate * seconds)
    plan = Plan(attach=EVENTS, expect=tokens, drain=seconds + 10)
    costs, calls = [], 0
    for _ in range(bench.runs):
        each = {}
        for count in (1, readers + 1):
            with bench.serving(RIVULET, loop) as (upstream, server):
                model = f"fake:k={tokens}:r={rate}:t=1"
                result = bench.load(upstream, server, model, replace(plan, readers=count))
                calls += upstream.get("/stats")["requests"]
            label = f"{loop or RIVULET}, {count} readers, {rate}/s"
            outcome.runs.setdefault(label, []).append(result)
            each[count] = result.server_cpu / result.generated
        costs.append((each[readers + 1] - each[1]) / readers * 1e6)
    outcome.add(_EXTRA.format(rate), loop or RIVULET, costs)
    return calls / (2 * bench.runs)


def readers(bench: Bench) -> Outcome:
    """One generation with 1,001 readers against the same with one."""
    outcome = Outcome()
    for rate, most in ((50, 10), (200, 3)):
        calls = _extra_reader(bench, outcome, rate)
        cost = outcome.value(_EXTRA.format(rate), RIVULET)
        outcome.at_most(most, "us", f"CPU of an extra reader, a token at {rate}/s", cost)
        outcome.at_most(1, "", f"upstream calls a generation at {rate}/s", calls)
    return outcome


def replayed(bench: Bench) -> Outcome:
    """A finished answer of 10,000 tokens, read again as NDJSON of dialect content."""
    outcome = Outcome()
    with bench.serving(RIVULET) as (_, server):
        seen = replay.measure(server, PATH, EVENTS, "fake:k=10000:r=0")
    outcome.add("bytes of text", RIVULET, [seen.text_bytes])
    outcome.add("bytes of body", RIVULET, [seen.body_bytes])
    outcome.add("bytes on the wire", RIVULET, [seen.wire_bytes])
    outcome.add("HTTP chunks", RIVULET, [seen.chunks])
    writes, how = seen.chunks, "chunks on the wire"
    if seen.system_calls is not None:
        outcome.add("write system calls", RIVULET, [seen.system_calls])
        writes, how = seen.system_calls, "write system calls"
    outcome.at_most(2, "", f"writes of a replay ({how})", writes)
    outcome.at_most(1.1, "x the text", "bytes of a replay", seen.body_bytes / seen.text_bytes)
    return outcome


def loops(bench: Bench) -> Outcome:
    """Rivulet on the standard event loop and on uvloop."""
    outcome = Outcome()
    for name, (model, plan) in {"saturated": SATURATED, "paced50": PACED50}.items():
        for _ in range(bench.runs):
            for loop in ("asyncio", "uvloop"):
                result = bench.sample(RIVULET, model, plan, loop)
                outcome.runs.setdefault(f"{loop}, {name}", []).append(result)
        for loop in ("asyncio", "uvloop"):
            runs = outcome.runs[f"{loop}, {name}"]
            outcome.add(f"{name}: {TOKENS}", loop, [run.tokens_per_cpu for run in runs])
    for loop in ("asyncio", "uvloop"):
        _extra_reader(bench, outcome, 50, loop)
    return outcome


STREAMS: dict[str, Case] = {
    "saturated": saturated,
    "paced50": paced50,
    "paced150": paced150,
    "short": short,
    "ttft": ttft,
    "memory": memory,
    "readers": readers,
    "replay": replayed,
    "loops": loops,
}
