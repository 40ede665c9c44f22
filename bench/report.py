"""What the cases found, as JSON, as one page of tables, and as a plot.

Each case is a file of its own, `NAME.json`; the page and the plot are made anew from all there are.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.cases import DIRECT, PEERS, Outcome
from bench.catalog import CASES

_PACKAGES = (
    *("aiohttp", "aiohttp-sse", "openai", "orjson", "uvloop", "fastapi", "uvicorn", "httptools"),
    *("websockets", "sse-starlette", "python-socketio"),
)
_CPUS = "server_cpu", "load_cpu", "helper_cpu"
_GOOD = ("101", "200", "201", "202")
_COLOURS = {peer: f"C{i}" for i, peer in enumerate((*PEERS, DIRECT))}


def save(folder: Path, name: str, outcome: Outcome, settings: dict[str, float]) -> None:
    """Writes one case's file."""
    found = {
        "case": name,
        "about": CASES[name].__doc__,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": _machine(),
        "settings": settings,
        **asdict(outcome),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def publish(folder: Path) -> str:
    """Makes `results.md` and `plot.png` from the cases' files; returns the page's text."""
    cases = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    cases.sort(key=lambda case: list(CASES).index(case["case"]))
    page = (
        "\n\n".join([_head(cases), _targets(cases), _values(cases), _runs(cases), _crowds(cases)])
        + "\n"
    )
    (folder / "results.md").write_text(page)
    _plot(folder / "plot.png", cases)
    return page


def _machine() -> str:
    def installed(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    packages = ", ".join(map(installed, _PACKAGES))
    cpu = f"{len(os.sched_getaffinity(0))} x {names[0] if names else platform.machine()}"
    return f"{cpu}; Linux {platform.release()}; Python {platform.python_version()}; {packages}"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _head(cases: Sequence[dict[str, Any]]) -> str:
    machines = dict.fromkeys(case["machine"] for case in cases)
    lines = ["# Measured by `python -m bench`", "", *machines, ""]
    for case in cases:
        settings = ", ".join(f"{key} {value:g}" for key, value in case["settings"].items())
        lines.append(f"- **{case['case']}**: {case['about']} ({case['when']}; {settings})")
    lines += ["", "How to read this: `bench/README.md`.", "", "![plot](plot.png)"]
    return "\n".join(lines)


def _targets(cases: Sequence[dict[str, Any]]) -> str:
    rows = [
        [case["case"], target["wanted"], target["measured"], "yes" if target["reached"] else "NO"]
        for case in cases
        for target in case["targets"]
    ]
    return _table("Targets", ["case", "target", "measured", "reached"], rows)


def _values(cases: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            case["case"],
            value["measure"],
            value["peer"],
            _number(value["median"]),
            f"{_number(value['low'])} to {_number(value['high'])}",
        ]
        for case in cases
        for value in case["values"]
    ]
    return _table("Measured", ["case", "measure", "peer", "median", "runs"], rows)


def _runs(cases: Sequence[dict[str, Any]]) -> str:
    header = [
        *("case", "peer", "run", "tokens/s", "server busy", "load's core busy", "answers"),
        *("first ms p50, p99", "latency ms p50, p99", "gap ms p50, p99", "lost", "trouble"),
    ]
    rows = []
    for case in cases:
        for peer, runs in case["runs"].items():
            for i, run in enumerate(runs, 1):
                busy = (run["load_cpu"] + run["upstream_cpu"]) / run["seconds"]
                rows.append(
                    [
                        *(case["case"], peer, str(i), _number(run["tokens"] / run["seconds"])),
                        *(f"{run['server_cpu'] / run['seconds']:.0%}", f"{busy:.0%}"),
                        str(run["finished"]),
                        *(_spread(run[name]) for name in ("first_ms", "latency_ms", "gap_ms")),
                        str(run["lost"] + run["extra"]),
                        _trouble(run),
                    ]
                )
    return _table("Each run", header, rows)


def _crowds(cases: Sequence[dict[str, Any]]) -> str:
    header = [
        *("case", "peer", "run", "subscribers", "publishes", "deliveries/s", "bytes a delivery"),
        *("server busy", "load busy", "Redis busy", "latency ms p50, p99"),
        *("lost", "extra", "out of order", "trouble"),
    ]
    rows = []
    for case in cases:
        for peer, runs in case.get("crowds", {}).items():
            for i, run in enumerate(runs, 1):
                seconds = max(run["seconds"], 0.01)
                rows.append(
                    [
                        *(case["case"], peer, str(i), f"{run['subscribers']:,}"),
                        *(f"{run['publishes']:,}", _number(run["deliveries"] / seconds)),
                        f"{run['bytes'] / max(run['deliveries'], 1):.0f}",
                        *(f"{run.get(cpu, 0) / seconds:.0%}" for cpu in _CPUS),
                        _spread(run["latency_ms"]),
                        *(f"{run[name]:,}" for name in ("lost", "extra", "disorder")),
                        _trouble(run),
                    ]
                )
    return _table("Each run with a room", header, rows)


def _spread(spread: dict[str, float] | None) -> str:
    return f"{spread['p50']:.2f}, {spread['p99']:.2f}" if spread else ""


def _trouble(run: dict[str, Any]) -> str:
    bad = {status: count for status, count in run["statuses"].items() if status not in _GOOD}
    return ", ".join(f"{count} x {what}" for what, count in (bad | run["errors"]).items())


def _plot(path: Path, cases: Sequence[dict[str, Any]]) -> None:
    """One panel a measure that has several peers, or several runs; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases:
        for value in case["values"]:
            if case["case"] != "replay":  # its numbers are counts, not measures
                panels.setdefault((case["case"], value["measure"]), []).append(value)
    if not panels:
        return
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, ((name, measure), values) in zip(grid, panels.items(), strict=False):
        median = [value["median"] for value in values]
        below = [value["median"] - value["low"] for value in values]
        above = [value["high"] - value["median"] for value in values]
        bars = axes.bar(
            [value["peer"] for value in values],
            median,
            yerr=[below, above],
            capsize=3,
            color=[_COLOURS.get(value["peer"], "C7") for value in values],
        )
        axes.bar_label(bars, [_number(number) for number in median], fontsize=8, padding=2)
        axes.set_title(f"{name}: {measure.removeprefix(name + ': ')}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="x", rotation=20 if len(values) > 4 else 0)
        axes.margins(y=0.15)
    figure.savefig(path, dpi=110)
