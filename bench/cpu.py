"""CPU time of a process tree, and which core runs what."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_ENDED = (FileNotFoundError, ProcessLookupError)  # it was there when /proc was listed


class Cores(NamedTuple):
    """One core for the server, one for the client; None where there is only one for both."""

    server: int | None
    client: int | None


def choose_cores() -> Cores:
    """Take the first and the last core that this process may use."""
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[-1]) if len(usable) > 1 else Cores(None, None)


def pin(core: int | None, pid: int = 0) -> None:
    """Bind every thread of a process (0: this one) to `core`; what it starts later inherits that."""
    if core is None:
        return
    for thread in _threads(pid or os.getpid()):
        os.sched_setaffinity(int(thread.name), {core})


def cpu_time(pid: int) -> int:
    """Return the CPU time in ns of all threads of a process and its descendants.

    The first field of /proc/PID/task/TID/schedstat counts in ns; utime and stime of /proc/PID/stat count
    in ticks of 10 ms.
    """
    total = 0
    for member in tree(pid):
        for thread in _threads(member):
            with suppress(*_ENDED):
                total += int((thread / "schedstat").read_text().split()[0])
    return total


def _threads(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except _ENDED:
        return []


def tree(root: int) -> set[int]:
    """Return `root` and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(*_ENDED):
            # The name in parentheses may hold anything; the parent is the second field after it.
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(entry.name))
    tree, waiting = {root}, [root]
    while waiting:
        found = children.get(waiting.pop(), [])
        tree.update(found)
        waiting.extend(found)
    return tree
