"""What the kernel knows of a process: CPU seconds and resident memory, from /proc."""

import gc
import os
import resource
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """CPU seconds (user and system, all threads) and resident bytes of one or more processes."""

    cpu: float
    rss: int


def family(pid: int) -> list[int]:
    """`pid` and its living descendants; empty when the process is gone."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        children = [Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in threads]
    except OSError:
        return []
    found = [pid]
    for child in " ".join(children).split():
        found += family(int(child))
    return found


def usage(*pids: int) -> Usage:
    """What these processes with threads and children have used so far; a dead one adds nothing."""
    cpu, rss = 0, 0
    for pid in (member for root in pids for member in family(root)):
        try:
            line = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        # The name in brackets may hold anything; the numbers start after the last bracket.
        fields = line[line.rindex(")") + 2 :].split()
        cpu += sum(int(field) for field in fields[11:15])  # utime stime cutime cstime
        rss += int(fields[21])
    return Usage(cpu / _TICK, rss * _PAGE)


def on_cpu(pid: int) -> float:
    """CPU seconds of the living threads of this process and its children, to the nanosecond: for
    one that does little, where the ticks of `usage` are too coarse. 0 where there is none.
    """
    if not pid:
        return 0.0
    threads = [task for each in family(pid) for task in Path(f"/proc/{each}/task").iterdir()]
    return sum(int((task / "schedstat").read_text().split()[0]) for task in threads) / 1e9


def more_files(pid: int = 0) -> None:
    """Lets this process (0: our own) open as many files as it may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


def unhindered() -> None:
    """For a load generator: many sockets, and no pause of ours to be taken for the server's."""
    more_files()
    gc.disable()
