"""`python -m bench`: runs the cases and writes their tables and plot."""

import argparse
import time
from pathlib import Path

from bench import report
from bench.cases import Bench
from bench.catalog import CASES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="measures Rivulet")
    parser.add_argument(
        "--only", action="append", help="the cases whose names begin so (repeatable)"
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each sample (3)")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured seconds of a run (4)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    bench = Bench(options.runs, options.seconds)
    settings = {"runs": options.runs, "seconds": options.seconds}
    wanted = [name for name in CASES if name.startswith(tuple(options.only or [""]))]
    if not wanted:
        parser.error(f"no such case; there are {', '.join(CASES)}")
    for name in wanted:
        begin = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        outcome = CASES[name](bench)
        report.save(options.out, name, outcome, settings)
        print(f"{time.monotonic() - begin:.0f} s", flush=True)
    print(report.publish(options.out))


if __name__ == "__main__":
    main()
